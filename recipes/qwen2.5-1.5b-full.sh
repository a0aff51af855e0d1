#!/usr/bin/env bash
# Table 2, Qwen2.5-1.5B-Instruct trained on dapo-full. 1 GPU, or GPUS=4 as in the paper. Status: not run (README.md).
#   GPUS=4 bash recipes/qwen2.5-1.5b-full.sh          needs pyarrow (pip install pyarrow): some sets are parquet on the hub
# Expected (the paper's avg @1/@32): base 16.05/46.67, GRPO 17.91/46.56, N=16 17.83/46.14, DAPO 18.09/46.08, Ours 18.70/52.50.
set -euo pipefail
DATA=${DATA:-data}
GPUS=${GPUS:-1}
OUT=${OUT:-out/qwen2.5-1.5b-full}
MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
RUN="torchrun --standalone --nproc-per-node $GPUS"
SAMPLE="--decode-rows 512 --decode-tokens 1000000"
GRPO="train_grpo.py --model $MODEL --data $DATA/dapo14k.jsonl --steps 100 $SAMPLE"
EVAL="$DATA/math500.jsonl $DATA/aime24.jsonl $DATA/aime25.jsonl $DATA/amc23.jsonl"

python recipes/get_data.py dapo14k math500 aime24 aime25 amc23 --out $DATA
$RUN $GRPO --out $OUT/grpo
$RUN $GRPO --group-size 16 --out $OUT/grpo16
$RUN $GRPO --algo dapo --overlong-buffer 1024 --out $OUT/dapo
$RUN $GRPO --revise --out $OUT/ours
$RUN eval.py --model $MODEL $OUT/grpo/model $OUT/grpo16/model $OUT/dapo/model $OUT/ours/model --data $EVAL $SAMPLE --out $OUT/eval
