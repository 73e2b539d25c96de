#!/usr/bin/env bash
# The tests on a fresh machine. Arguments go to pytest: `scripts/test.sh -m slow` runs the long real-model ones.
set -euo pipefail
. "$(dirname "$0")/environment.sh" dev
cd "$root"
ruff check .
ruff format --check .
mypy
if [ $# -eq 0 ]; then set -- -m "not slow"; fi
# A worker for each core, with one thread: tiny models have no work for two.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
