#!/usr/bin/env bash
# Recovery of zero-hit prompts by a real 0.5B model, beside its controls, small: 20 problems of GSM8K on two CPU cores.
#   bash recipes/qwen2.5-0.5b-cpu.sh                  needs pyarrow (pip install pyarrow): the hub has GSM8K as parquet
# MODEL takes another model, LIMIT more problems; DTYPE=float32 is for a processor without AVX512-BF16 or AMX (twice the memory).
# Estimated, where 9 of the 20 are zero-hit: 40 minutes on two free cores, 3.1 GB in each of two processes. From CPU seconds and peaks with
# Qwen2.5-Coder-0.5B-Instruct: 32 rollouts 4 s each; of one zero-hit prompt, a revision with its continuations 130 s, --vertices random 35 s.
# Each command continues where it stopped. Status: not run as a whole; parts of it are in RESULTS.md, "A real model".
set -euo pipefail
DATA=${DATA:-data}
MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}
OUT=${OUT:-out/qwen2.5-0.5b}
LIMIT=${LIMIT:-20}
DTYPE=${DTYPE:-bfloat16}
RUN="torchrun --standalone --nproc-per-node 2"
MODELFLAGS="--model $MODEL --device cpu --dtype $DTYPE --max-new-tokens 512 --decode-rows 64"
REVISE="$MODELFLAGS --rollouts $OUT/rollouts --attempts 1 --revise-tokens 1024"
ZERO="$MODELFLAGS --data $OUT/rollouts/zero_hit.jsonl -n 8 --seed 1"
export OMP_NUM_THREADS=1

python recipes/get_data.py gsm8k --out $DATA
$RUN rollout.py $MODELFLAGS --data $DATA/gsm8k.jsonl --limit $LIMIT -n 8 --out $OUT/rollouts
$RUN revise.py $REVISE --out $OUT/arms/latentrevise
$RUN revise.py $REVISE --alpha-guide 0 --gamma0 0.3 --out $OUT/arms/explore-only
$RUN revise.py $REVISE --vertices random --out $OUT/arms/noise
$RUN revise.py $REVISE --revision-steps 0 --out $OUT/arms/hard-prefix
$RUN rollout.py $ZERO --out $OUT/arms/fresh
$RUN -m baselines.hint $ZERO --out $OUT/arms/hint
$RUN -m baselines.hint $ZERO --from perturbed --out $OUT/arms/perturbed
python -m experiments.real_model $OUT/arms --model $MODEL --device cpu --dtype $DTYPE
