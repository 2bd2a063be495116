#!/usr/bin/env bash
# One process and no launcher, in this terminal: for breakpoints, profilers and reading what really happens.
#
#     launch/local_debug.sh recipes/debug/tiny-bert.yaml [key=value …]
#
# RUN_DIR=folder of the run (default: runs/ and the recipe file's name), PYTHON=the interpreter (default: python).
# Ctrl-C stops at the next step with a checkpoint; the same command goes on from there. Nothing restarts by itself.
# `dstrain run` does the same with one process, and adds a progress bar, verdicts and restarts.
set -euo pipefail

recipe=${1:?"usage: $0 RECIPE [key=value …]"}
shift
python=${PYTHON:-python}
run_dir=${RUN_DIR:-runs/$(basename "$recipe" .yaml)}

# One writer for each run folder: this shell, and what it becomes below, holds the lock.
mkdir -p "$run_dir"
exec 9>>"$run_dir/run.lock"
flock --nonblock 9 || { echo "error: $run_dir is in use by another run" >&2; exit 2; }
echo $$ >"$run_dir/run.lock"

# The recipe, checked, with all defaults and overrides in it, is what the ranks read: $run_dir/recipe.yaml.
attempt=$("$python" -m dstrain.rundir.prepare "$recipe" "$@" --run-dir "$run_dir")

# What torchrun would set for the only rank.
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=1
export MASTER_ADDR=127.0.0.1 MASTER_PORT="${MASTER_PORT:-29500}"

exec "$python" -u -m dstrain.rank --run-dir "$run_dir" --attempt "$attempt" --terminal
