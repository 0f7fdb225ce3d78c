#!/bin/bash
# Several models under the same conditions on one node, one rank per GPU, or two ranks on a CPU partition:
#
#   sbatch slurm/compare.sh 'models=[squeezenet1_1,resnet50]' data.root=shards/imagenet
#   sbatch --gpus-per-node=8 --cpus-per-task=96 slurm/compare.sh ...
#
# Submit from the checkout. Everything after the script's name goes to `python -m pipeline.compare`. To compare over
# several nodes, submit one slurm/train.sh per model with the same other keys: their ledgers are comparable.

# What a site must change, here or on the command line: partition and account if it has no defaults, time, CPUs.
##SBATCH --partition=gpu
##SBATCH --account=project
##SBATCH --mem=32G
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

num_ranks=$((gpus_per_node > 0 ? gpus_per_node : 2))
echo "job $SLURM_JOB_ID: $num_ranks ranks on $SLURM_JOB_NODELIST, $SLURM_CPUS_ON_NODE CPUs," \
    "$gpus_per_node GPUs: $python -m pipeline.compare $*"

# The comparison spawns its ranks itself: Slurm's variables describe this shell, which is none of them, and the threads
# of a rank depend on how many it starts.
unset "${!SLURM_@}" OMP_NUM_THREADS
exec "$python" -m pipeline.compare cluster.devices="$num_ranks" "$@"
