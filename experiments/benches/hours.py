"""GPU-hours of the recipes, computed and not measured, from operations and bytes.

Assumed: an H200 at half of 790 TFLOP/s and 60 % of 4.8 TB/s; prompts of 150 tokens and responses of 1,000. A decoding
step reads weights and cache once; `host` adds 1 ms a block for Python to dispatch it, which a CUDA graph would not
need. Longer responses cost in proportion: base models on hard problems often write more.
"""
import argparse
import json

from experiments.benches.memory import QWEN, parameters, sizes

FLOPS, BYTES = 0.5 * 790e12, 0.6 * 4.8e12  # a second
PROMPT, RESPONSE, HOST = 150, 1000, 1e-3
ROWS = {"Qwen2.5-1.5B": 512, "Qwen3-8B": 256}  # sequences decoded together, as in the recipes
GPUS = {"Qwen2.5-1.5B": 4, "Qwen3-8B": 8}
REVISED = 16384 // (PROMPT + RESPONSE)  # rollouts revised together, at the default --revise-tokens
TRAIN, STEPS, BATCH = 14_116, 100, 512  # DAPO's problems; steps of a recipe and prompts a step
ZERO_HIT = {"Qwen2.5-1.5B": 6_580 / 14_116, "Qwen3-8B": 3_642 / 14_116}  # at N = 32, from the paper
TESTS = 500 + 30 + 30 + 40


def decode(c, tokens: float, rows: int, host: bool) -> float:
    """GPU-seconds to sample so many tokens."""
    root, block = parameters(c)
    cache = 2 * 2 * sizes(c)[2] * sizes(c)[-1]  # bytes a token: key and value, bfloat16
    step = (2 * (root + sizes(c)[-1] * block) + rows * (PROMPT + RESPONSE / 2) * cache) / BYTES
    return tokens / rows * (step + host * HOST * sizes(c)[-1])


def hours(name: str, host: bool) -> dict[str, float]:
    """GPU-hours of every stage of a recipe."""
    c, recomputed = QWEN[name], 2 if name == "Qwen3-8B" else 0  # --checkpoint-activations: one more forward pass
    root, block = parameters(c)
    P = root + sizes(c)[-1] * block
    text = PROMPT + RESPONSE
    update = lambda n, reference=2: BATCH * n * text * (6 + recomputed + reference) * P / FLOPS  # a step
    # a process has its share of a step, and no more to decode together
    sample = lambda n: decode(c, BATCH * n * RESPONSE, min(ROWS[name], BATCH * n // GPUS[name]), host)
    # a failed rollout: ten forward and backward passes, no gradients of weights; eight continuations of the last fifth
    revise = 10 * (4 + recomputed) * P * text / FLOPS + decode(c, 8 * 0.2 * RESPONSE, 8 * REVISED, host)
    zero = ZERO_HIT[name]
    runs = {"rollout, N = 32": decode(c, TRAIN * 32 * RESPONSE, ROWS[name], host),
            "revise, one attempt a prompt": zero * TRAIN * revise,
            "SFT": STEPS * BATCH * text * (6 + recomputed) * P / FLOPS,
            "GRPO N=8": STEPS * (update(8) + sample(8)), "GRPO N=16": STEPS * (update(16) + sample(16)),
            "OPSD": STEPS * (update(1) + sample(1)),
            "GRPO+LatentRevise, all zero-hit": STEPS * (update(8) + sample(8) + BATCH * revise),
            "GRPO+LatentRevise, full set": STEPS * (update(8) + sample(8) + zero * BATCH * revise),
            "DAPO, two rounds of sampling": STEPS * (update(8, 0) + 2 * sample(8)),
            "evaluation of a model": decode(c, TESTS * 32 * RESPONSE, ROWS[name], host)}
    return {run: round(seconds / 3600, 1) for run, seconds in runs.items()}


def main(args: argparse.Namespace) -> None:
    for name in QWEN:
        for host in (False, True):
            print(json.dumps({"measure": "hours_computed", "model": name, "unit": "GPU-hours", "host": host,
                              **hours(name, host)}))
