"""What the paper does not have: controls, the optimizer of an ablation, and other step rules for revise.py,
a flag each.

Nothing here is used at the defaults, which are the paper's Algorithm 1; RESULTS.md says what each is worth.

    --vertices random    noise of the same size, which takes no pass; --gold permuted, another prompt's answer;
                         --from of revise.py is the third control
    --optimizer adam                     Table 3's "no Frank-Wolfe"
    --direction pairwise, away           Lacoste-Julien & Jaggi 2015 (arXiv 1511.05932), Alg. 2 and Alg. 1
    --step-rule short                    gap / (L |d|^2) (Demyanov & Rubinov 1970; arXiv 1806.05123, Eq. 1), L from the
                                         last two gradients [ours]
    --step-rule backtracking             Armijo's condition; every trial is a forward pass, counted in `passes`
    --rho-rule surprise                  the cut before the response token that the model found least likely [ours]
    --min-logprob -0.5                   keeps right continuations that are likely after the projected prefix too [ours]
"""
import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

import rollout
import training
from common import UserError

# Dimension key: R prefix, D model width, V vocabulary rows, m atoms of a prefix

ARMIJO = 0.1  # share of the slope's promise that a step has to keep
TRIALS = 4  # step sizes tried per backtracking step, each half of the one before
SHARES = (0.5, 0.95)  # --rho-rule surprise looks for the cut between these shares of a response


# --- controls --------------------------------------------------------------------------------------------------------
def random_vertices(f, step: int, allowed: Tensor, seed: int) -> Tensor:
    """One allowed id per position of a failure, (R,), that no gradient has chosen."""
    generator = torch.Generator().manual_seed(rollout.row_key(seed, f.id, f.sample, "vertex", step))
    return allowed[torch.randint(len(allowed), (len(f.r),), generator=generator).to(allowed.device)]


def permuted_answers(answers: dict[str, str], seed: int) -> dict[str, str]:
    """Each prompt gets the answer of another prompt, a different one. Raises UserError if all are equal."""
    if len(set(answers.values())) < 2:
        raise UserError("--gold permuted needs prompts with at least two different answers")
    order = sorted(answers, key=lambda i: rollout.row_key(seed, i, "permuted"))
    cycle = order + order
    return {i: next(answers[j] for j in cycle[k + 1:] if answers[j] != answers[i]) for k, i in enumerate(order)}


def adam_step(E: Tensor, g: Tensor, moments: tuple[Tensor, Tensor], step: int, lr: float) -> Tensor:
    """One step of Adam (Kingma & Ba 2015) on the free prefix (R, D), which may leave the hull."""
    m, v = moments
    m.mul_(0.9).add_(g, alpha=0.1)
    v.mul_(0.999).addcmul_(g, g, value=0.001)
    return E - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)  # denominators: bias corrections


# --- steps that move weight between atoms ----------------------------------------------------------------------------
@dataclass
class Move:
    """A direction d for one prefix: `vertex` (R,) ids gains weight (None: nothing does), atom number `away` loses it
    (None: all lose in proportion). slope = -<G, d>; limit, the largest step that leaves no weight negative."""
    vertex: Tensor | None
    away: int | None
    slope: float
    limit: float
    norm2: float  # |d|^2


def direction(f, g: Tensor, E: Tensor, v: Tensor, W: Tensor, rule: str) -> Move:
    """Where to go from E (R, D) with gradient g (R, D) and linear oracle's vertex v (R,): toward v, as in Eq. (7); from
    the worst atom in use to v (pairwise); or, if that promises more, straight away from it (away)."""
    toward = W[v].float()
    forward = Move(v, None, float((g * (E - toward)).sum()), 1.0, float((toward - E).square().sum()))
    used = [k for k, w in enumerate(f.weights) if w > 0]
    if rule == "frank-wolfe" or len(used) < 2:
        return forward
    a = max(used, key=lambda k: float((g * W[f.atoms[k]].float()).sum()))
    worst, weight = W[f.atoms[a]].float(), f.weights[a]
    if rule == "pairwise":
        return Move(v, a, float((g * (worst - toward)).sum()), weight, float((toward - worst).square().sum()))
    slope = float((g * (worst - E)).sum())
    # denominator: the weight that the other atoms hold and that is to grow to 1
    return forward if forward.slope >= slope else Move(
        None, a, slope, weight / (1 - weight), float((worst - E).square().sum()))


def moved(f, move: Move, gamma: float) -> tuple[list[Tensor], list[float]]:
    """Atoms and weights of a failure after a step of size gamma <= move.limit; the failure is not changed."""
    if move.away is None:
        atoms, weights = f.atoms, [(1 - gamma) * w for w in f.weights]  # Eq. (7)
    elif move.vertex is None:
        atoms, weights = f.atoms, [(1 + gamma) * w for w in f.weights]
        weights[move.away] = max(0.0, weights[move.away] - gamma)
    else:
        atoms, weights = f.atoms, list(f.weights)
        weights[move.away] -= gamma
    return (atoms, weights) if move.vertex is None else ([*atoms, move.vertex], [*weights, gamma])


# --- step sizes ------------------------------------------------------------------------------------------------------
def short_step(move: Move, first: float, before: tuple[Tensor, Tensor] | None, now: tuple[Tensor, Tensor]) -> float:
    """argmin over gamma of -slope gamma + L |d|^2 gamma^2 / 2 with L = |G - G'| / |E - E'| from the step before;
    `first` where there was none. before, now: (E, G)."""
    if before is None:
        return min(first, move.limit)
    change, gradients = (float((a - b).norm()) for a, b in zip(now, before))
    curvature = gradients / max(change, 1e-12) * move.norm2  # denominator: distance of the two iterates
    return min(max(move.slope, 0.0) / max(curvature, 1e-12), move.limit)  # denominator: curvature along d


def backtrack(batch: list, moves: dict[int, Move], first: float, at: dict[int, float], total) -> dict[int, float]:
    """Armijo: from twice the last step (`first` at the start), halved until L(gamma) <= L(0) - 0.1 gamma slope,
    at most TRIALS times, then 0. A rollout that has found its step rides along in the pass of the others,
    and is not charged."""
    last = {b: batch[b].gammas[-1] if batch[b].gammas else 0.0 for b in moves}
    gammas = {b: min(2 * last[b] or first, m.limit) for b, m in moves.items()}
    searching = dict(moves)
    for _ in range(TRIALS):
        values = total({b: moved(batch[b], m, gammas[b]) for b, m in searching.items()})
        for b, m in list(searching.items()):
            batch[b].passes += 1
            if values[b] <= at[b] - ARMIJO * gammas[b] * m.slope:
                del searching[b]
            else:
                gammas[b] /= 2
        if not searching:
            break
    return gammas | dict.fromkeys(searching, 0.0)


def take_steps(i: int, batch: list, soft: list[Tensor], moving: dict[int, tuple[Tensor, Tensor]], W: Tensor,
               args: argparse.Namespace, at: dict[int, float], total) -> None:
    """Step i of a batch of failures by --direction and --step-rule: changes their atoms and weights.

    soft: prefixes (R, D); moving: {rollout: (gradient (R, D), vertices (R,))}; at: {rollout: L_total};
    total({rollout: (atoms, weights)}) gives the same elsewhere, in one forward pass.
    """
    moves = {b: direction(batch[b], g, soft[b], v, W, args.direction) for b, (g, v) in moving.items()}
    if args.step_rule == "diminishing":
        gammas = {b: min(args.gamma0 * 2 / (i + 1), m.limit) for b, m in moves.items()}
    elif args.step_rule == "short":
        gammas = {b: short_step(m, args.gamma0, batch[b].before, (soft[b], moving[b][0])) for b, m in moves.items()}
    else:
        gammas = backtrack(batch, moves, args.gamma0, at, total)
    for b, m in moves.items():
        f = batch[b]
        f.before = soft[b], moving[b][0]
        f.atoms, f.weights = moved(f, m, gammas[b])
        f.gammas.append(gammas[b])


# --- where to cut ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def surprise_cuts(model, rollouts: list[dict]) -> list[int]:
    """|r| of every rollout: r ends before the response token of the lowest log-probability among those between SHARES
    of the response. One forward pass over the failed rollouts."""
    logp, _, owner = training.response_logprobs(model, rollouts)
    cuts = []
    for b, r in enumerate(rollouts):
        n = len(r["response_ids"])
        low, high = max(1, int(SHARES[0] * n)), max(2, int(SHARES[1] * n))
        cuts.append(low + int(logp[owner == b][low:high].argmin()))
    return cuts


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
    parser.add_argument("--direction", default="frank-wolfe", choices=["frank-wolfe", "pairwise", "away"],
                        help="[Eq. 7] frank-wolfe; the others move weight between the tokens already used")
    parser.add_argument("--step-rule", default="diminishing", choices=["diminishing", "short", "backtracking"],
                        help="[Eq. 7] gamma0 * 2/(i+1); the others begin at gamma0 and go by the loss")
    parser.add_argument("--rho-rule", default="fixed", choices=["fixed", "surprise"],
                        help="[Table 7] fixed: --rho; surprise cuts each rollout at its least likely token")
    parser.add_argument("--min-logprob", type=float,
                        help="[ours] keep right continuations with at least this mean log-probability (nats a token) "
                             "after the projected prefix; not given: keep all, as the paper does")
