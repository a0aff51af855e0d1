"""What the paper does not have: controls, the optimizer of an ablation and a filter for revise.py, a flag each.

Nothing here is used at the defaults, which are the paper's Algorithm 1; RESULTS.md says what each is worth.

    --vertices random    noise of the same size, which takes no pass; --gold permuted, another prompt's answer;
                         --from of revise.py is the third control
    --optimizer adam     Table 3's "no Frank-Wolfe"
    --min-logprob -0.5   keeps right continuations that are likely after the projected prefix too [ours]
"""
import argparse

import torch
from torch import Tensor

from helpers import training
from helpers.common import UserError
from helpers.sampling import row_key

# Dimension key: R prefix, D model width


# --- controls --------------------------------------------------------------------------------------------------------
def random_vertices(f, step: int, allowed: Tensor, seed: int) -> Tensor:
    """One allowed id per position of a failure, (R,), that no gradient has chosen."""
    generator = torch.Generator().manual_seed(row_key(seed, f.id, f.sample, "vertex", step))
    return allowed[torch.randint(len(allowed), (len(f.r),), generator=generator).to(allowed.device)]


def permuted_answers(answers: dict[str, str], seed: int) -> dict[str, str]:
    """Each prompt gets the answer of another prompt, a different one. Raises UserError if all are equal."""
    if len(set(answers.values())) < 2:
        raise UserError("--gold permuted needs prompts with at least two different answers")
    order = sorted(answers, key=lambda i: row_key(seed, i, "permuted"))
    cycle = order + order
    return {i: next(answers[j] for j in cycle[k + 1:] if answers[j] != answers[i]) for k, i in enumerate(order)}


def adam_step(E: Tensor, g: Tensor, moments: tuple[Tensor, Tensor], step: int, lr: float) -> Tensor:
    """One step of Adam (Kingma & Ba 2015) on the free prefix (R, D), which may leave the hull."""
    m, v = moments
    m.mul_(0.9).add_(g, alpha=0.1)
    v.mul_(0.999).addcmul_(g, g, value=0.001)
    return E - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)  # denominators: bias corrections


# --- which recovered trajectories are kept ---------------------------------------------------------------------------
@torch.no_grad()
def drop_unlikely(model, prompt_ids: list[int], continuations: list[dict], least: float) -> None:
    """Takes the reward from right continuations whose tokens have a mean log-probability below `least` (nats) after
    prompt_ids, the prompt and the projected prefix; records it as `logprob`.
    What only the soft prefix led to is unlikely."""
    for c in (c for c in continuations if c["reward"]):
        logp, *_ = training.response_logprobs(model, [{"prompt_ids": prompt_ids, "response_ids": c["ids"]}],
                                              entropy=False)
        c["logprob"] = float(logp.mean())  # denominator: tokens of the continuation
        c["reward"] = int(c["logprob"] >= least)


def add_control_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vertices", default="oracle", choices=["oracle", "random"], help="[ours] control: random")
    parser.add_argument("--optimizer", default="frank-wolfe", choices=["frank-wolfe", "adam"],
                        help="[Table 3] adam is the unconstrained ablation; its prefixes are not stored")
    parser.add_argument("--adam-lr", type=float, default=1e-2, help="[ours] step size of --optimizer adam")
    parser.add_argument("--min-logprob", type=float,
                        help="[ours] keep right continuations with at least this mean log-probability (nats a token) "
                             "after the projected prefix; not given: keep all, as the paper does")
