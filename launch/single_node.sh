#!/usr/bin/env bash
# All devices of this machine through plain torchrun: what `dstrain run` starts, to be read, copied and changed.
#
#     launch/single_node.sh RANKS recipes/pretrain/bert-base.yaml [key=value …]
#
# RANKS: one for each device; on a machine without devices any number that divides data.lanes (see `dstrain plan`).
# RUN_DIR=folder of the run (default: runs/ and the recipe file's name), PYTHON=the interpreter (default: python).
# SIGTERM, Ctrl-C and SIGUSR1 stop at the next step with a checkpoint; the same command goes on from there. Nothing
# restarts by itself; `dstrain run --procs-per-node RANKS` adds restarts, verdicts and a progress bar.
set -euo pipefail

ranks=${1:?"usage: $0 RANKS RECIPE [key=value …]"}
recipe=${2:?"usage: $0 RANKS RECIPE [key=value …]"}
shift 2
python=${PYTHON:-python}
run_dir=${RUN_DIR:-runs/$(basename "$recipe" .yaml)}

# One writer for each run folder: this shell, and what it becomes below, holds the lock.
mkdir -p "$run_dir"
exec 9>>"$run_dir/run.lock"
flock --nonblock 9 || { echo "error: $run_dir is in use by another run" >&2; exit 2; }
echo $$ >"$run_dir/run.lock"

# The recipe, checked, with all defaults and overrides in it, is what the ranks read: $run_dir/recipe.yaml.
attempt=$("$python" -m dstrain.rundir.prepare "$recipe" "$@" --run-dir "$run_dir")

# torchrun would set one thread for each rank; the cores are there to be used.
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
# All ranks are on this machine, so neither its name nor its network has to work.
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"

echo "attempt $attempt; follow it with: tail -F $run_dir/attempts/$(printf %04d "$attempt")/logs/*/rank-00000.log" >&2

# torchrun, of the same interpreter. Its agent starts the ranks with RANK, WORLD_SIZE, MASTER_ADDR and so on, passes
# the listed signals on to them (it would die of SIGUSR1 and orphan them), and gives them ten minutes to save.
exec "$python" -m torch.distributed.run \
    --standalone --local-addr=127.0.0.1 --nproc-per-node="$ranks" --max-restarts=0 \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout=600 \
    -m dstrain.rank --run-dir "$run_dir" --attempt "$attempt"
