#!/bin/bash
# One training over the nodes of an allocation, one rank per GPU, or one per node on a CPU partition:
#
#   sbatch slurm/train.sh name=first data.root=shards/imagenet model=squeezenet1_1 trainer.max_epochs=90
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=96 slurm/train.sh name=first ...
#
# Submit from the checkout, which every node must see. Everything after the script's name goes to
# `python -m pipeline.train`. Options before it override those below.
#
# The job comes back by itself until the run is finished: before the time limit, after preemption, `scontrol requeue`,
# the loss of a node (Slurm's own doing) or of a rank (ours). Not after an error of its own, and not for ever: three times
# in a row without a new checkpoint end it (cluster.max_fruitless_requeues). To end it yourself: scancel. The same command
# submitted again goes on too, on any number of nodes; a finished run exits 0 at once.
#
# A sweep: a file with the overrides of one training per line, its name= among them, in words as a shell reads them, and
# an array over the trainings (blank lines and comments are none):
#   SQUEEZEWIRE_SWEEP=sweep.txt sbatch --array=1-8 slurm/train.sh data.root=shards/imagenet trainer.max_epochs=90

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
#SBATCH --requeue
# To the ranks, three to four minutes before the time limit: the step, a save and W&B must fit
# (cluster.preempt_grace_seconds). Without `B:`, for this shell would only pass it on.
#SBATCH --signal=USR1@180

set -euo pipefail
[ -f "${SLURM_SUBMIT_DIR:?run this with sbatch}/slurm/environment.sh" ] || {
    echo "error: $SLURM_SUBMIT_DIR is not the checkout: submit with 'cd CHECKOUT && sbatch slurm/train.sh ...'." >&2
    exit 2
}
source "$SLURM_SUBMIT_DIR/slurm/environment.sh"

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && [ -n "${SQUEEZEWIRE_SWEEP:-}" ]; then
    overrides=$("$python" -m pipeline.run.launch.sweep "$SQUEEZEWIRE_SWEEP" "$SLURM_ARRAY_TASK_ID") || exit
    eval "set -- \"\$@\" $overrides" # which were quoted for it
fi

num_ranks=${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * ranks_per_node))}
echo "job $SLURM_JOB_ID${SLURM_RESTART_COUNT:+, restart $SLURM_RESTART_COUNT}: $num_ranks ranks on" \
    "$SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), $cpus_per_rank CPUs each, $gpus_per_node GPUs per node:" \
    "$python -m pipeline.train $*"

# Signals reach the ranks from Slurm; one that reaches this shell (--signal=B:..., scancel --batch) is passed on as
# USR1, because srun answers SIGTERM with SIGKILL to its ranks. The shell itself waits for them.
srun_pid=
signalled=
pass_on() {
    signalled=yes
    [ -z "$srun_pid" ] || kill -USR1 "$srun_pid" 2> /dev/null || true
}
trap pass_on TERM INT USR1 USR2

# Where ranks that end with an error say so (pipeline/core/exits.py): srun reports the highest code of all, and so the 137 of
# those that waited for them in vain.
export SQUEEZEWIRE_CAUSES=$SLURM_SUBMIT_DIR/.slurm-causes/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
trap 'rm -rf "$SQUEEZEWIRE_CAUSES"; rmdir "${SQUEEZEWIRE_CAUSES%/*}" 2> /dev/null || true' EXIT

# srun starts the ranks itself: who is which rank, and where the first one listens, is read from its variables.
# Ranks that fail agree on it and leave with the same code, but not at the same instant. So the first to leave does not
# take the others with it (--kill-on-bad-exit=1 would turn their code into 143, or cut a save short): they have
# SLURM_WAIT seconds (rank 0 may still upload to W&B), and are ended if they hang. Ranks that lose a peer notice by
# themselves, gloo's at once; before they have met, from what ended.sh leaves.
export SLURM_WAIT=${SLURM_WAIT:-300} SLURM_KILL_BAD_EXIT=0
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$num_ranks" --cpus-per-task="$cpus_per_rank" \
    --task-epilog="$SLURM_SUBMIT_DIR/slurm/ended.sh" "$python" -m pipeline.train "$@" &
srun_pid=$!
[ -z "$signalled" ] || pass_on # it came before there was anybody to tell
while :; do
    signalled=
    wait "$srun_pid" && code=0 || code=$?
    [ -n "$signalled" ] || break # a signal ends `wait`, not srun
done
[ "$code" -ne 0 ] || exit 0

# Only here, when all ranks are gone and what they saved is durable, and only while Slurm has nothing else in mind: a job
# that is being cancelled or requeued is no longer RUNNING.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
if ! [ -x "$(command -v scontrol)" ]; then
    echo "No scontrol here, so this job cannot put itself back into the queue (exit code $code; 75: submit it again)."
    exit "$code"
fi

# A controller that is being restarted answers in a while.
patiently() {
    local tries
    for ((tries = 30; tries > 0; tries--)); do
        "$@" && return
        sleep 4
    done
    return 1
}
# shellcheck disable=SC2329  # `patiently` calls it
ask_state() {
    state=$(scontrol --oneliner show job "$job") && [[ "$state" == *" JobState="* ]]
}
if patiently ask_state && [[ "$state" != *" JobState=RUNNING "* ]]; then
    echo "Slurm is ending this job itself (exit code of the ranks: $code)."
    exit "$code"
fi
"$python" -m pipeline.requeue "$code" "$@" && answer=0 || answer=$?
if [ "$answer" -eq 0 ]; then
    patiently scontrol requeue "$job" || echo "Slurm does not take it back: submit the same command again." >&2
elif [ "$answer" -gt 1 ] && [ "$answer" -lt 126 ]; then
    code=$answer # of the rank that is the reason; 1 and 126 on: the question itself failed
fi
exit "$code"
