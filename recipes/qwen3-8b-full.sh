#!/usr/bin/env bash
# Table 2, Qwen3-8B-Base trained on dapo-full. 8 GPUs. Status: not run (README.md). Memory: see qwen3-8b-hard.sh.
#   DATA=dapo.jsonl bash recipes/qwen3-8b-full.sh
# Expected (the paper's avg @1/@32): base 18.24/64.36, GRPO 32.76/64.04, N=16 34.33/68.83, DAPO 31.02/66.07, Ours 35.77/71.26.
set -euo pipefail
DATA=${DATA:?problems as JSONL with id, problem, answer}
EVAL=${EVAL:-math500,aime24,aime25,amc23}
GPUS=${GPUS:-8}
OUT=${OUT:-out/qwen3-8b-full}
MODEL=${MODEL:-Qwen/Qwen3-8B-Base}
RUN="torchrun --standalone --nproc-per-node $GPUS"
PROMPT="--prompt-format plain"

$RUN train_grpo.py --model $MODEL --checkpoint-activations --data $DATA --steps 100 --decode-rows 256 --decode-tokens 200000 $PROMPT --out $OUT/grpo
$RUN train_grpo.py --model $MODEL --checkpoint-activations --data $DATA --steps 100 --decode-rows 256 --decode-tokens 200000 $PROMPT --group-size 16 --out $OUT/grpo16
$RUN train_grpo.py --model $MODEL --checkpoint-activations --data $DATA --steps 100 --decode-rows 256 --decode-tokens 200000 $PROMPT --algo dapo --overlong-buffer 1024 --out $OUT/dapo
$RUN train_grpo.py --model $MODEL --checkpoint-activations --data $DATA --steps 100 --decode-rows 256 --decode-tokens 200000 $PROMPT --revise --out $OUT/ours
$RUN eval.py --model $MODEL $OUT/grpo/model $OUT/grpo16/model $OUT/dapo/model $OUT/ours/model --benchmarks $EVAL --decode-rows 256 --decode-tokens 200000 $PROMPT --out $OUT/eval
