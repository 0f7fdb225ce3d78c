#!/bin/bash
# Variants of a training on several seeds, and one report on what each costs and reaches:
#
#   sbatch slurm/study.sh study=strategies data.root=shards/cifar10
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=96 slurm/study.sh study=models ...
#
# or the variants beside one another, each task of an array a part of them, and a job more that writes the report:
#
#   sbatch --array=1-4 slurm/study.sh study=strategies data.root=shards/cifar10
#   sbatch --dependency=singleton slurm/study.sh study=strategies data.root=shards/cifar10
#
# One rank per GPU, or one per node on a CPU partition (--ntasks-per-node says otherwise). On a single node (the
# default) the ranks are that node's: one per GPU, or two. A job that ends before the study does, by its time or in
# any other way, has saved what it had: submit the same again. Submit from the checkout, which every node must see.
# Everything after the script's name goes to `python -m pipeline.study`.

# What a site must change, here or on the command line: partition and account if it has no defaults, time, CPUs.
##SBATCH --partition=gpu
##SBATCH --account=project
##SBATCH --mem=32G
#SBATCH --job-name=squeezewire-study
#SBATCH --nodes=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
# Before the time is up, the training under way gets so many seconds to save.
#SBATCH --signal=B:TERM@180
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail
[ -f "${SLURM_SUBMIT_DIR:?run this with sbatch}/slurm/environment.sh" ] || {
    echo "error: $SLURM_SUBMIT_DIR is not the checkout: submit with 'cd CHECKOUT && sbatch slurm/study.sh ...'." >&2
    exit 2
}
source "$SLURM_SUBMIT_DIR/slurm/environment.sh"
module=pipeline.study
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    # shellcheck disable=SC2153 # Slurm sets them all
    number=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / SLURM_ARRAY_TASK_STEP + 1))
    [ "$number" -le "$SLURM_ARRAY_TASK_COUNT" ] || fail "The tasks of --array must have equal distances, such as 1-4."
    set -- "study.part=$number/$SLURM_ARRAY_TASK_COUNT" "$@"
fi
source "$SLURM_SUBMIT_DIR/slurm/trainings.sh"
