#!/usr/bin/env bash
# The session that the README shows: from a model and a file to a model of one's own. Prints each command, then runs it.
#
#   scripts/session.sh DIRECTORY     works in DIRECTORY; a minute or ten on 2 CPU cores, with SmolLM2-135M-Instruct
set -euo pipefail
place=${1:?name a directory to work in}
set --
. "$(dirname "$0")/environment.sh"
mkdir -p "$place"
cd "$place"
python - "$root/scripts" <<'PYTHON'
import json, sys
sys.path.insert(0, sys.argv[1])
import demo_data

for name, rows in zip(("notes", "held-out"), demo_data.split(train=800, evaluation=100, seed=0)):
    with open(f"{name}.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            turns = ("system", "instruction"), ("user", "input"), ("assistant", "output")
            file.write(json.dumps({"messages": [{"role": r, "content": row[c]} for r, c in turns]}) + "\n")
PYTHON
ln -sfn "$model" smollm2.gguf

run() {
    echo "\$ $*"
    # shellcheck disable=SC2294
    eval "$@" 2>/dev/null
    echo
}

run "qdora quantize smollm2.gguf base-nf4"
run "qdora init base-nf4 notes.jsonl"
run "qdora estimate qdora.yaml"
run "qdora train qdora.yaml --learning_rate 1e-3 --gradient_accumulation_steps 2 --num_train_epochs 2 --eval_steps 60"
run "qdora evaluate base-nf4 --adapter notes-adapter --dataset held-out.jsonl"
run "qdora chat base-nf4 --adapter notes-adapter --compare --system 'Turn the spoken note into JSON.' --max_new_tokens 32 --prompt 'laundry 24 pounds at South Pier'"
run "qdora inspect notes-adapter"
run "qdora merge base-nf4 notes-adapter merged"
