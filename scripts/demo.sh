#!/usr/bin/env bash
# The main job on a fresh machine: environment, real model, quantize, train, merge, a table of before and after.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
python "$root/scripts/demo.py" "$model" "$@"
