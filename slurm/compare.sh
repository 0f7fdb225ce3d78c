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
module=pipeline.compare
source "$SLURM_SUBMIT_DIR/slurm/trainings.sh"
