#!/usr/bin/env bash
# Table 2, Qwen2.5-1.5B-Instruct trained on dapo-full. 1 GPU, or GPUS=4 as in the paper. Status: not run (README.md).
#   DATA=dapo.jsonl GPUS=4 bash recipes/qwen2.5-1.5b-full.sh
# Expected (the paper's avg @1/@32): base 16.05/46.67, GRPO 17.91/46.56, N=16 17.83/46.14, DAPO 18.09/46.08, Ours 18.70/52.50.
set -euo pipefail
DATA=${DATA:?problems as JSONL with id, problem, answer}
EVAL=${EVAL:-math500,aime24,aime25,amc23}
GPUS=${GPUS:-1}
OUT=${OUT:-out/qwen2.5-1.5b-full}
MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
RUN="torchrun --standalone --nproc-per-node $GPUS"

$RUN train_grpo.py --model $MODEL --data $DATA --steps 100 --decode-rows 512 --decode-tokens 1000000 --out $OUT/grpo
$RUN train_grpo.py --model $MODEL --data $DATA --steps 100 --decode-rows 512 --decode-tokens 1000000 --group-size 16 --out $OUT/grpo16
$RUN train_grpo.py --model $MODEL --data $DATA --steps 100 --decode-rows 512 --decode-tokens 1000000 --algo dapo --overlong-buffer 1024 --out $OUT/dapo
$RUN train_grpo.py --model $MODEL --data $DATA --steps 100 --decode-rows 512 --decode-tokens 1000000 --revise --out $OUT/ours
$RUN eval.py --model $MODEL $OUT/grpo/model $OUT/grpo16/model $OUT/dapo/model $OUT/ours/model --benchmarks $EVAL --decode-rows 512 --decode-tokens 1000000 --out $OUT/eval
