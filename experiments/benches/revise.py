"""One Frank-Wolfe step of revise.py against Algorithm 1 written literally."""
import argparse
import json
import statistics

import torch

import revise
from experiments import literal
from experiments.benches.tools import random_qwen2, report, saved_bytes, timed
from helpers import common

SHAPES = {"short": (150, 800, 200, 20), "long": (150, 3200, 800, 20)}  # tokens: q, r, c, template and gold together


def random_failure(shape: tuple[int, int, int, int], vocab: int, seed: int = 1) -> revise.Failure:
    """A failed rollout of so many tokens (q, r, c, template and gold together, 4 of them gold)."""
    q, r, c, a = shape
    ids = torch.randint(0, vocab, (q + r + c + a,), generator=torch.Generator().manual_seed(seed)).tolist()
    return revise.Failure("bench", 0, ids[:q], ids[q:q + r], ids[q + r:q + r + c], ids[-a:-4], ids[-4:])


def literal_step(model, f: revise.Failure, W: torch.Tensor, E: torch.Tensor, weights: tuple) -> tuple:
    """Losses, gradient and vertices by literal.py, with backward(): parameters that nobody froze get gradients too."""
    E = E.detach().requires_grad_()
    losses = literal.losses(model, f, E)
    sum(w * loss for w, loss in zip(weights, losses)).backward()
    model.zero_grad(set_to_none=True)
    return torch.stack(losses).detach(), E.grad, (E.grad.float() @ W.float().T).argmin(-1)


def literal_frozen_step(model, *step) -> tuple:
    """The literal step for a model that somebody froze: what packing alone is worth."""
    model.requires_grad_(False)
    try:
        return literal_step(model, *step)
    finally:
        model.requires_grad_(True)


def packed_step(model, f: revise.Failure, W: torch.Tensor, E: torch.Tensor, weights: tuple) -> tuple:
    losses, G, v = packed_steps(model, [f], W, E, weights)
    return losses[0], G, v


def packed_steps(model, batch: list[revise.Failure], W: torch.Tensor, E: torch.Tensor, weights: tuple,
                 checkpoint: bool = False) -> tuple:
    """One Frank-Wolfe step of several rollouts as revise.py does it."""
    with revise.frozen(model, checkpoint):
        p = revise.pack(batch, weights, False, W.device)
        losses, G = revise.losses_and_gradient(model, p, E)
    return losses, G, revise.best_rows(-G, W, torch.arange(len(W), device=W.device))


def main(args: argparse.Namespace) -> None:
    device = common.pick_device(args)
    model = random_qwen2(args, device)
    W = model.get_input_embeddings().weight.detach()
    weights = (1.0, 1.0, 0.1)
    for name, shape in SHAPES.items():
        f = random_failure(shape, len(W))
        step = (model, f, W, W[f.r].float(), weights)
        (ours, G, v), (theirs, G_literal, v_literal) = packed_step(*step), literal_step(*step)
        agreement = {"gradient_relative_error": float((G - G_literal).norm() / G_literal.norm()),
                     "vertices_equal": float((v == v_literal).float().mean()),
                     "losses_relative_error": float(((ours - theirs) / theirs).abs().max())}
        runs = [[timed(s, *step) for s in (packed_step, literal_step, literal_frozen_step)] for _ in range(args.runs)]
        fast, slow, frozen = (statistics.median(x) for x in zip(*runs))
        report(f"revise_step_{name}", fast, slow, "seconds", shape=shape, threads=torch.get_num_threads(),
               ratio_to_frozen=round(frozen / fast, 3), **agreement)
        ours, theirs, frozen = (saved_bytes(model, s, *step) for s in (packed_step, literal_step, literal_frozen_step))
        report(f"revise_saved_bytes_{name}", ours, theirs, "bytes", shape=shape,
               ratio_to_frozen=round(frozen / ours, 3))
    if device.type == "cuda":
        bench_revise_cuda(model, W, weights, args)


def bench_revise_cuda(model, W: torch.Tensor, weights: tuple, args: argparse.Namespace) -> None:
    """Seconds per rollout-step and peak memory by batch size and length. Reference: the floor of operations at
    790 TFLOP/s (7.5 + 0.37 TFLOP for the short shape), a computed figure."""
    floor = 9.9e-3
    for name, shape, batch, checkpoint in [*(("1k", SHAPES["short"], n, False) for n in (1, 2, 4, 8, 16)),
                                           ("8k", (150, 6400, 1600, 20), 1, False),
                                           ("8k", (150, 6400, 1600, 20), 1, True)]:
        failures = [random_failure(shape, len(W), seed) for seed in range(batch)]
        step = (model, failures, W, W[[i for f in failures for i in f.r]].float(), weights, checkpoint)
        packed_steps(*step)
        torch.cuda.reset_peak_memory_stats()
        # denominator: rollouts
        seconds = statistics.median(timed(packed_steps, *step) for _ in range(args.runs)) / batch
        print(json.dumps({"measure": f"revise_step_{name}_batch{batch}" + "_checkpointed" * checkpoint, "ours": seconds,
                          "unit": "seconds per rollout-step", "peak_bytes": torch.cuda.max_memory_allocated(),
                          **({"floor": floor, "share_of_floor": round(floor / seconds, 3)} if name == "1k" else {})}),
              flush=True)
