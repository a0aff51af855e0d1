#!/usr/bin/env bash
# Table 1, Qwen2.5-1.5B-Instruct trained on dapo-hard. 1 GPU, or GPUS=4 as in the paper (4x B200 there). Status: not run (README.md).
#   GPUS=4 bash recipes/qwen2.5-1.5b-hard.sh          needs pyarrow (pip install pyarrow): some sets are parquet on the hub
# Expected (the paper's avg @1/@32): base 16.05/46.67, GRPO 14.65/44.84, N=16 17.71/50.69, OPSD 7.07/40.42, SFT+Ours 17.62/50.50, GRPO+Ours 18.13/53.51;
# zero-hit prompts: 6,580 of 14,116 (46.6 %).
set -euo pipefail
DATA=${DATA:-data}
GPUS=${GPUS:-1}
OUT=${OUT:-out/qwen2.5-1.5b}
MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
RUN="torchrun --standalone --nproc-per-node $GPUS"
SAMPLE="--decode-rows 512 --decode-tokens 1000000"
HARD="--model $MODEL --data $OUT/rollouts/zero_hit.jsonl --steps 100 $SAMPLE"
EVAL="$DATA/math500.jsonl $DATA/aime24.jsonl $DATA/aime25.jsonl $DATA/amc23.jsonl"

python recipes/get_data.py dapo14k math500 aime24 aime25 amc23 --out $DATA
$RUN rollout.py --model $MODEL --data $DATA/dapo14k.jsonl -n 32 $SAMPLE --out $OUT/rollouts
$RUN revise.py --model $MODEL --rollouts $OUT/rollouts --decode-rows 128 --out $OUT/revised
$RUN train_sft.py --model $MODEL --data $OUT/revised/recovered.jsonl --steps 100 --out $OUT/sft
$RUN train_grpo.py $HARD --out $OUT/grpo
$RUN train_grpo.py $HARD --group-size 16 --out $OUT/grpo16
$RUN -m baselines.train_opsd $HARD --out $OUT/opsd
$RUN train_grpo.py $HARD --revise --out $OUT/ours
$RUN eval.py --model $MODEL $OUT/sft/model $OUT/grpo/model $OUT/grpo16/model $OUT/opsd/model $OUT/ours/model --data $EVAL $SAMPLE --out $OUT/eval
