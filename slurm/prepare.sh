#!/bin/bash
# Pictures to verified WebDataset shards, on one node with many cores:
#
#   sbatch slurm/prepare.sh source=/datasets/ILSVRC2012 out=shards/imagenet short_side=256
#
# Submit from the checkout. Everything after the script's name goes to `python -m pipeline.prepare`. A job that was
# killed goes on where it stopped when the same command is submitted again.

# What a site must change, here or on the command line: partition and account if it has no defaults, time, CPUs.
##SBATCH --partition=cpu
##SBATCH --account=project
##SBATCH --mem=16G
#SBATCH --job-name=squeezewire-prepare
#SBATCH --nodes=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail
[ -f "${SLURM_SUBMIT_DIR:?run this with sbatch}/slurm/environment.sh" ] || {
    echo "error: $SLURM_SUBMIT_DIR is not the checkout: submit with 'cd CHECKOUT && sbatch slurm/prepare.sh ...'." >&2
    exit 2
}
source "$SLURM_SUBMIT_DIR/slurm/environment.sh"

echo "job $SLURM_JOB_ID: $SLURM_CPUS_ON_NODE CPUs of $SLURM_JOB_NODELIST: $python -m pipeline.prepare $*"
unset "${!SLURM_@}" OMP_NUM_THREADS
exec "$python" -m pipeline.prepare "$@"
