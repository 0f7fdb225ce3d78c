#!/bin/bash
# Several models under the same conditions, one after another over the nodes of an allocation, one report:
#
#   sbatch --nodes=2 slurm/compare.sh 'models=[squeezenet1_1,resnet50]' data.root=shards/imagenet
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=96 slurm/compare.sh ...
#
# One rank per GPU, or one per node on a CPU partition (--ntasks-per-node says otherwise), so that what is measured
# crosses between real servers. On a single node (the default) the ranks are that node's: one per GPU, or two.
# Submit from the checkout, which every node must see. Everything after the script's name goes to
# `python -m pipeline.compare`.

# What a site must change, here or on the command line: partition and account if it has no defaults, time, CPUs.
##SBATCH --partition=gpu
##SBATCH --account=project
##SBATCH --mem=32G
# Nobody else on the nodes: without it, what others send is in the interface counters too.
##SBATCH --exclusive
#SBATCH --job-name=squeezewire-compare
#SBATCH --nodes=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail
[ -f "${SLURM_SUBMIT_DIR:?run this with sbatch}/slurm/environment.sh" ] || {
    echo "error: $SLURM_SUBMIT_DIR is not the checkout: submit with 'cd CHECKOUT && sbatch slurm/compare.sh ...'." >&2
    exit 2
}
source "$SLURM_SUBMIT_DIR/slurm/environment.sh"

if [ "$SLURM_JOB_NUM_NODES" -gt 1 ] || [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
    num_ranks=${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * ranks_per_node))}
    echo "job $SLURM_JOB_ID: $num_ranks ranks on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST)," \
        "$cpus_per_rank CPUs each, $gpus_per_node GPUs per node: $python -m pipeline.compare $*"
    # The comparison starts each training with srun, as slurm/train.sh does one, and learns from these how.
    export SLURM_NTASKS=$num_ranks SLURM_CPUS_PER_TASK=$cpus_per_rank
    export SLURM_WAIT=${SLURM_WAIT:-300} SLURM_KILL_BAD_EXIT=0
    exec "$python" -m pipeline.compare "$@"
fi

num_ranks=$((gpus_per_node > 0 ? gpus_per_node : 2))
echo "job $SLURM_JOB_ID: $num_ranks ranks on $SLURM_JOB_NODELIST, $SLURM_CPUS_ON_NODE CPUs," \
    "$gpus_per_node GPUs: $python -m pipeline.compare $*"

# The comparison spawns its ranks itself: Slurm's variables describe this shell, which is none of them, and the threads
# of a rank depend on how many it starts.
unset "${!SLURM_@}" OMP_NUM_THREADS
exec "$python" -m pipeline.compare cluster.devices="$num_ranks" "$@"
