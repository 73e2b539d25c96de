#!/usr/bin/env bash
# The three verbs, one after the other. Copy it, change it.
#
#   scripts/quantize_then_train.sh MODEL DATA.jsonl OUT [training flags ...]
#
# MODEL  a Hub id, a model directory or a GGUF file
# DATA   .jsonl, .json, .csv or .parquet: messages, prompt/completion, alpaca, sharegpt or text
# OUT    becomes OUT/base-nf4, OUT/adapter and OUT/merged; what is there already is not made again
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
model=$1 data=$2 out=$3
shift 3

# 1. The 16-bit model to NF4, once. The original is not needed after that.
[ -d "$out/base-nf4" ] || qdora quantize "$model" "$out/base-nf4"

# 2. The adapter. Flags given to this script override these.
[ -f "$out/adapter/adapter_model.safetensors" ] || qdora train \
    --model_name_or_path "$out/base-nf4" \
    --dataset "$data" \
    --output_dir "$out/adapter" \
    --lora_r 16 --lora_alpha 32 \
    --learning_rate 2e-4 --lr_scheduler_type cosine --warmup_steps 10 \
    --num_train_epochs 1 \
    "$@"

# 3. Base and adapter to a plain fp16 model that transformers, vLLM and llama.cpp's converter read.
[ -d "$out/merged" ] || qdora merge "$out/base-nf4" "$out/adapter" "$out/merged"
echo "merged model in $out/merged"
