# Sourced by compare.sh and study.sh, which set `module`: commands that start trainings themselves, one after another.
# shellcheck shell=bash disable=SC2154 # `module`, and what environment.sh sets

if [ "$SLURM_JOB_NUM_NODES" -gt 1 ] || [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
    num_ranks=${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * ranks_per_node))}
    echo "job $SLURM_JOB_ID: $num_ranks ranks on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST)," \
        "$cpus_per_rank CPUs each, $gpus_per_node GPUs per node: $python -m $module $*"
    # The command starts each training with srun, as slurm/train.sh does one, and learns from these how.
    export SLURM_NTASKS=$num_ranks SLURM_CPUS_PER_TASK=$cpus_per_rank
    export SLURM_WAIT=${SLURM_WAIT:-300} SLURM_KILL_BAD_EXIT=0
    exec "$python" -m "$module" "$@"
fi

num_ranks=$((gpus_per_node > 0 ? gpus_per_node : 2))
echo "job $SLURM_JOB_ID: $num_ranks ranks on $SLURM_JOB_NODELIST, $SLURM_CPUS_ON_NODE CPUs," \
    "$gpus_per_node GPUs: $python -m $module $*"

# The command spawns its ranks itself: Slurm's variables describe this shell, which is none of them, and the threads
# of a rank depend on how many it starts.
unset "${!SLURM_@}" OMP_NUM_THREADS
exec "$python" -m "$module" cluster.devices="$num_ranks" "$@"
