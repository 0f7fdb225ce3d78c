#!/bin/bash
# Would slurm/train.sh run with these nodes and keys? Checked in a minute, before a night is lost:
#
#   sbatch --nodes=4 --gpus-per-node=8 slurm/preflight.sh name=first data.root=shards/imagenet ...
#
# Give it what you would give slurm/train.sh. Add data.verify=sha256 to read every shard on every server. The table is in
# the job's output, and the exit code is that of the first thing that is wrong.

##SBATCH --partition=gpu
##SBATCH --account=project
##SBATCH --mem=32G
#SBATCH --job-name=squeezewire-preflight
#SBATCH --nodes=2
#SBATCH --cpus-per-task=8
#SBATCH --time=00:15:00
#SBATCH --output=%x-%j.out

set -euo pipefail
[ -f "${SLURM_SUBMIT_DIR:?run this with sbatch}/slurm/environment.sh" ] || {
    echo "error: $SLURM_SUBMIT_DIR is not the checkout: submit with 'cd CHECKOUT && sbatch slurm/preflight.sh ...'." >&2
    exit 2
}
source "$SLURM_SUBMIT_DIR/slurm/environment.sh"

num_ranks=${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * ranks_per_node))}
echo "job $SLURM_JOB_ID: $num_ranks ranks on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST)," \
    "$cpus_per_rank CPUs each, $gpus_per_node GPUs per node: $python -m pipeline.ready $*"
# As in slurm/train.sh: a rank that waits for one which has ended hears of it.
export SQUEEZEWIRE_CAUSES=$SLURM_SUBMIT_DIR/.slurm-causes/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
trap 'rm -rf "$SQUEEZEWIRE_CAUSES"; rmdir "${SQUEEZEWIRE_CAUSES%/*}" 2> /dev/null || true' EXIT
export SLURM_WAIT=${SLURM_WAIT:-90} SLURM_KILL_BAD_EXIT=0
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$num_ranks" --cpus-per-task="$cpus_per_rank" \
    --task-epilog="$SLURM_SUBMIT_DIR/slurm/ended.sh" "$python" -m pipeline.ready "$@"
