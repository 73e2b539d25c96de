#!/usr/bin/env bash
# Mutation testing of one file on a fresh machine: scripts/mutate.sh qdora/nf4.py (see scripts/mutate.py).
set -euo pipefail
. "$(dirname "$0")/environment.sh" dev
cd "$root"
[ -x "$venv/bin/mutmut" ] || python -m pip install --quiet mutmut==3.8.1
exec nice -n 19 python scripts/mutate.py "$@"
