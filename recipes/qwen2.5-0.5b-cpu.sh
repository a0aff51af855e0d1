#!/usr/bin/env bash
# Recovery of zero-hit prompts by a real 0.5B model, beside its controls, small: on a CPU, two processes of one thread each.
#   DATA=gsm8k.jsonl bash recipes/qwen2.5-0.5b-cpu.sh
# Status: run in part, with a Qwen2.5-Coder-0.5B-Instruct (RESULTS.md, "A real model"). Each command continues where it stopped.
# Memory about 2.5 GB a process in bfloat16; DTYPE=float32 on a processor without AVX512-BF16 or AMX, with twice the memory.
set -euo pipefail
DATA=${DATA:?problems as JSONL with id, problem, answer}
MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}
OUT=${OUT:-out/qwen2.5-0.5b}
LIMIT=${LIMIT:-20}
DTYPE=${DTYPE:-bfloat16}
RUN="torchrun --standalone --nproc-per-node 2"
MODELFLAGS="--model $MODEL --device cpu --dtype $DTYPE --max-new-tokens 512 --decode-rows 64"
REVISE="$MODELFLAGS --rollouts $OUT/rollouts --attempts 1 --revise-tokens 1024"
export OMP_NUM_THREADS=1

$RUN rollout.py $MODELFLAGS --data $DATA --limit $LIMIT -n 8 --out $OUT/rollouts
$RUN revise.py $REVISE --out $OUT/arms/latentrevise
$RUN revise.py $REVISE --alpha-guide 0 --gamma0 0.3 --out $OUT/arms/explore-only
$RUN revise.py $REVISE --vertices random --out $OUT/arms/noise
$RUN revise.py $REVISE --revision-steps 0 --out $OUT/arms/hard-prefix
$RUN rollout.py $MODELFLAGS --data $OUT/rollouts/zero_hit.jsonl -n 8 --seed 2 --out $OUT/arms/fresh
$RUN -m baselines.hint $MODELFLAGS --data $OUT/rollouts/zero_hit.jsonl --seed 1 --out $OUT/arms/hint
$RUN -m baselines.hint $MODELFLAGS --data $OUT/rollouts/zero_hit.jsonl --seed 1 --from perturbed --out $OUT/arms/perturbed
python -m experiments.real_model $OUT/arms --model $MODEL --device cpu --dtype $DTYPE
