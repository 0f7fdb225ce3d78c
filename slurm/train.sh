#!/bin/bash
# One training over the nodes of an allocation, one rank per GPU, or one per node on a CPU partition:
#
#   sbatch slurm/train.sh name=first data.root=shards/imagenet model=squeezenet1_1 trainer.max_epochs=90
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=96 slurm/train.sh name=first ...
#
# Submit from the checkout, which every node must see. The same command again resumes the run; a finished run exits 0 at
# once. Everything after the script's name goes to `python -m pipeline.train`. Options before it override those below.

# What a site must change, here or on the command line: partition and account if it has no defaults, time limit, and
# CPUs per node (--cpus-per-task counts a node's, until --ntasks-per-node says otherwise).
##SBATCH --partition=gpu
##SBATCH --account=project
##SBATCH --mem=32G
# Nobody else on the nodes: without it, what others send is in the interface counters too.
##SBATCH --exclusive
#SBATCH --job-name=squeezewire-train
#SBATCH --nodes=2
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail
[ -f "${SLURM_SUBMIT_DIR:?run this with sbatch}/slurm/environment.sh" ] || {
    echo "error: $SLURM_SUBMIT_DIR is not the checkout: submit with 'cd CHECKOUT && sbatch slurm/train.sh ...'." >&2
    exit 2
}
source "$SLURM_SUBMIT_DIR/slurm/environment.sh"

num_ranks=${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * ranks_per_node))}
echo "job $SLURM_JOB_ID: $num_ranks ranks on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST)," \
    "$cpus_per_rank CPUs each, $gpus_per_node GPUs per node: $python -m pipeline.train $*"

# srun starts the ranks itself: who is which rank, and where the first one listens, is read from its variables.
# Ranks that fail agree on it and leave with the same code, but not at the same instant. So the first to leave does not
# take the others with it (--kill-on-bad-exit=1 would turn their code into 143, or cut a save short): they have
# SLURM_WAIT seconds, and are ended if they hang.
export SLURM_WAIT=${SLURM_WAIT:-300} SLURM_KILL_BAD_EXIT=0
exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$num_ranks" --cpus-per-task="$cpus_per_rank" \
    "$python" -m pipeline.train "$@"
