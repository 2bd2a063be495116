#!/usr/bin/env bash
# Make a virtual environment with dstrain, its pinned dependencies and the tools of its developers.
#   bash tools/setup.sh .venv
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}

python=
for candidate in python3.11 python3.12 python3.13 python3; do
  if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || { echo "setup: no Python 3.11 or newer on PATH; install it (Debian: apt-get install python3)" >&2; exit 2; }

# Debian keeps venv in a package of its own.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -q && apt-get install -qy --no-install-recommends python3-venv
  else
    echo "setup: $python has no venv; run: apt-get install python3-venv" >&2
    exit 2
  fi
fi

echo "setup: $("$python" --version) → $venv (torch, DeepSpeed, Transformers, …: some minutes the first time)"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
"$venv/bin/dstrain" --help >/dev/null
echo "setup: ready"
