#!/usr/bin/env bash
# Table 1, Qwen3-8B-Base trained on dapo-hard. 8 GPUs. Status: not run (README.md).
#   bash recipes/qwen3-8b-hard.sh                     needs pyarrow (pip install pyarrow): some sets are parquet on the hub
# Memory (computed, `python -m experiments.bench memory`): train_grpo is sharded over the 8 processes; each holds 18.4 GB of weights,
# gradients, moments and reference, 16.4 GB of the copy that samples, up to 14.0 GB gathered and 8.9 GB of activations, 58 GB in
# all (train_sft: 37 GB), while it updates. rollout, revise, eval and the sampling of train_grpo are not sharded: 16.4 GB (train_grpo: beside the
# 18.4) and the KV cache, 147 KB a token: --decode-tokens 200000 are 29 GB. Each process loads the whole model in host memory first: 33 GB.
# Several nodes: torchrun with --nnodes and --rdzv-endpoint in place of --standalone, and OUT on a disk that all of them see.
# Expected (the paper's avg @1/@32): base 18.24/64.36, GRPO 19.43/62.75, N=16 21.01/58.90, OPSD 16.09/60.36, SFT+Ours 21.26/64.46, GRPO+Ours 22.58/65.14;
# zero-hit prompts: 3,642 of 14,116 (25.8 %).
set -euo pipefail
DATA=${DATA:-data}
GPUS=${GPUS:-8}
OUT=${OUT:-out/qwen3-8b}
MODEL=${MODEL:-Qwen/Qwen3-8B-Base}
RUN="torchrun --standalone --nproc-per-node $GPUS"
SAMPLE="--decode-rows 256 --decode-tokens 200000 --prompt-format plain"
HARD="--model $MODEL --checkpoint-activations --data $OUT/rollouts/zero_hit.jsonl --steps 100 $SAMPLE"
EVAL="$DATA/math500.jsonl $DATA/aime24.jsonl $DATA/aime25.jsonl $DATA/amc23.jsonl"

python recipes/get_data.py dapo14k math500 aime24 aime25 amc23 --out $DATA
$RUN rollout.py --model $MODEL --data $DATA/dapo14k.jsonl -n 32 $SAMPLE --out $OUT/rollouts
$RUN revise.py --model $MODEL --rollouts $OUT/rollouts --checkpoint-activations --decode-rows 128 --out $OUT/revised
$RUN train_sft.py --model $MODEL --checkpoint-activations --data $OUT/revised/recovered.jsonl --steps 100 --out $OUT/sft
$RUN train_grpo.py $HARD --out $OUT/grpo
$RUN train_grpo.py $HARD --group-size 16 --out $OUT/grpo16
$RUN -m baselines.train_opsd $HARD --out $OUT/opsd
$RUN train_grpo.py $HARD --revise --out $OUT/ours
$RUN eval.py --model $MODEL $OUT/sft/model $OUT/grpo/model $OUT/grpo16/model $OUT/opsd/model $OUT/ours/model --data $EVAL $SAMPLE --out $OUT/eval
