# shellcheck shell=bash
# Sourced by the job scripts beside it, on the first node of an allocation. Sets:
#   python          the interpreter of the checkout's environment
#   ranks_per_node  one per GPU; on a CPU partition what --ntasks-per-node says, else one
#   cpus_per_rank   this node's CPUs divided by its ranks
#
# A site may set, in the shell that calls sbatch or here:
#   SQUEEZEWIRE_PYTHON                        another interpreter, e.g. one inside a container
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME    the interface that carries the gradients, where a node has several
#                                             (default: gloo takes the one its host name resolves to, NCCL chooses)
# and load here what its nodes need (`module load ...`). Torch's wheels carry their own CUDA libraries.

fail() {
    echo "error: $*" >&2
    exit 2
}

cd "$SLURM_SUBMIT_DIR" || fail "SLURM_SUBMIT_DIR=$SLURM_SUBMIT_DIR cannot be entered."

if [ -n "${SQUEEZEWIRE_PYTHON:-}" ]; then
    python=$SQUEEZEWIRE_PYTHON
elif [ -x .venv/bin/python ]; then
    python=$PWD/.venv/bin/python
elif [ -n "${CONDA_PREFIX:-}" ]; then
    python=$CONDA_PREFIX/bin/python
else
    fail "No Python environment in $PWD: run 'make venv' there, or activate the conda environment before sbatch," \
        "or set SQUEEZEWIRE_PYTHON."
fi
[ -x "$(command -v "$python")" ] || fail "$python is no program on $(hostname): is it on a file system all nodes share?"

gpus_per_node=${SLURM_GPUS_ON_NODE:-0}
if [ -n "${SLURM_NTASKS:-}" ]; then
    ranks_per_node=${SLURM_TASKS_PER_NODE%%[(,]*} # "4(x2),3" starts with this node's
else
    ranks_per_node=$((gpus_per_node > 0 ? gpus_per_node : 1))
fi
if [ "$gpus_per_node" -gt 0 ] && [ "$ranks_per_node" -ne "$gpus_per_node" ]; then
    fail "$ranks_per_node ranks for $gpus_per_node GPUs on each node: leave --ntasks and --ntasks-per-node out," \
        "which gives every GPU its rank, or make them equal."
fi
cpus_per_rank=$((SLURM_CPUS_ON_NODE / ranks_per_node))
[ "$cpus_per_rank" -ge 1 ] || fail "$SLURM_CPUS_ON_NODE CPUs for $ranks_per_node ranks on each node: raise --cpus-per-task."
export OMP_NUM_THREADS=$cpus_per_rank
# By which the ranks know one another, and nobody else.
SQUEEZEWIRE_SECRET=$(</proc/sys/kernel/random/uuid)$(</proc/sys/kernel/random/uuid)
export SQUEEZEWIRE_SECRET
# What is exported here and in the scripts is for the ranks, also where `sbatch --export=NONE` or a site keeps the
# submitter's variables out of the job: srun would obey that too.
export SLURM_EXPORT_ENV=ALL
