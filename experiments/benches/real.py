"""A real model, --model, with the prompts of --data: a Frank-Wolfe step against Algorithm 1 written literally, sampling
against generate(), and the share of the machine's matrix-product rate that decoding reaches."""
import argparse
import statistics

import torch

import rollout
from experiments.benches.revise import literal_frozen_step, literal_step, packed_step, random_failure
from experiments.benches.rollout import compare
from experiments.benches.tools import report, timed
from helpers import common
from helpers.common import UserError

SHAPE = (140, 240, 60, 20)  # tokens of q, r, c, template and gold together: as GSM8K's of a 0.5B model
PROMPTS, SAMPLES = 8, 8


def product_rate(config, dtype: torch.dtype, rows: int) -> float:
    """Operations a second of the model's largest products, at so many rows."""
    width, inner = config.hidden_size, config.intermediate_size
    x, y = torch.randn(rows, width).to(dtype), torch.randn(rows, inner).to(dtype)
    # every layer has its own: weights that stay in a cache would flatter
    ups, downs = ([torch.randn(shape).to(dtype) for _ in range(config.num_hidden_layers)]
                  for shape in ((inner, width), (width, inner)))

    def products() -> None:
        for up, down in zip(ups, downs):
            torch.nn.functional.linear(x, up)
            torch.nn.functional.linear(y, down)

    products()
    seconds = statistics.median(timed(products) for _ in range(5))
    return 4 * rows * width * inner * config.num_hidden_layers / seconds


def bench_sampling(policy: common.Policy, prompts: list[list[int]], limit: int, runs: int) -> None:
    """Responses at temperature 1, lengths as they come, of at most `limit` tokens."""
    model, rows = policy.model, PROMPTS * SAMPLES
    fast, slow, _ = compare(policy, [*map(torch.tensor, prompts)], SAMPLES, limit, rows, range(runs))
    body = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    achieved = 2 * body * 1000 / fast  # operations a second
    rate = product_rate(model.config, model.dtype, rows)
    report("real_sampling", fast, slow, "seconds per 1,000 tokens", dtype=str(model.dtype), rows=rows, limit=limit,
           threads=torch.get_num_threads(), gflops=round(achieved / 1e9), product_gflops=round(rate / 1e9),
           share_of_products=round(achieved / rate, 3))


def main(args: argparse.Namespace) -> None:
    if not args.data:
        raise UserError("real: --data names the problems whose prompts are used")
    how = rollout.get_args(["--model", args.model, "--data", args.data, "--out", "-", "--device", "cpu",
                            "--dtype", args.dtype, "--limit", str(PROMPTS)])
    policy = common.load_model(how, common.pick_device(how))
    problems = rollout.read_problems(how.data, how)
    prompts = [rollout.prompt_ids(policy.tokenizer, p["problem"], how) for p in problems]
    W = policy.model.get_input_embeddings().weight.detach()
    f = random_failure(SHAPE, policy.vocab)
    step = (policy.model, f, W, W[f.r].float(), (1.0, 1.0, 0.1))
    for s in (packed_step, literal_step, literal_frozen_step):
        s(*step)
    runs = [[timed(s, *step) for s in (packed_step, literal_step, literal_frozen_step)] for _ in range(args.runs)]
    fast, slow, frozen = (statistics.median(x) for x in zip(*runs))
    report("real_step", fast, slow, "seconds", dtype=str(W.dtype), shape=SHAPE, threads=torch.get_num_threads(),
           ratio_to_frozen=round(frozen / fast, 3))
    bench_sampling(policy, prompts, 300, max(1, args.runs // 2))
