#!/bin/bash
# Slurm runs it on a rank's node when the rank has ended, however it did (--task-epilog in train.sh). Ranks that still
# wait for that one to come then wait no longer; once they have met, they notice by themselves.
mkdir -p "$SQUEEZEWIRE_CAUSES" && : > "$SQUEEZEWIRE_CAUSES/ended$SLURM_PROCID"
