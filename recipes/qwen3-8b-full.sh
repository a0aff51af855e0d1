#!/usr/bin/env bash
# Table 2, Qwen3-8B-Base trained on dapo-full. 8 GPUs. Status: not run (README.md). Memory: see qwen3-8b-hard.sh.
#   bash recipes/qwen3-8b-full.sh                     needs pyarrow (pip install pyarrow): some sets are parquet on the hub
# Expected (the paper's avg @1/@32): base 18.24/64.36, GRPO 32.76/64.04, N=16 34.33/68.83, DAPO 31.02/66.07, Ours 35.77/71.26.
set -euo pipefail
DATA=${DATA:-data}
GPUS=${GPUS:-8}
OUT=${OUT:-out/qwen3-8b-full}
MODEL=${MODEL:-Qwen/Qwen3-8B-Base}
RUN="torchrun --standalone --nproc-per-node $GPUS"
SAMPLE="--decode-rows 256 --decode-tokens 200000 --prompt-format plain"
GRPO="train_grpo.py --model $MODEL --checkpoint-activations --data $DATA/dapo14k.jsonl --steps 100 $SAMPLE"
EVAL="$DATA/math500.jsonl $DATA/aime24.jsonl $DATA/aime25.jsonl $DATA/amc23.jsonl"

python recipes/get_data.py dapo14k math500 aime24 aime25 amc23 --out $DATA
$RUN $GRPO --out $OUT/grpo
$RUN $GRPO --group-size 16 --out $OUT/grpo16
$RUN $GRPO --algo dapo --overlong-buffer 1024 --out $OUT/dapo
$RUN $GRPO --revise --out $OUT/ours
$RUN eval.py --model $MODEL $OUT/grpo/model $OUT/grpo16/model $OUT/dapo/model $OUT/ours/model --data $EVAL $SAMPLE --out $OUT/eval
