"""GRPO that rescues a zero-hit group by the answer hint: a right response to a prompt that tells
the answer takes the place of a failed one, as if the plain prompt had led to it (see hint.py).

    python -m baselines.train_hint --model toy/sums_model --data hard.jsonl --out out/grpo-hint

Flags, files and everything else are those of train_grpo.py with --revise; as many hinted responses
are drawn for a group without a hit as the group has. Differs from train_grpo.py: `recover` alone.
"""
import argparse

import revise
import rollout
import train_grpo
from baselines.hint import HINT, hint_text, with_hint
from helpers import common
from helpers.common import Policy

PROBLEMS: dict[str, dict] = {}  # {id: problem}: recover() is given the failed rollouts alone


def recover(policy: Policy, failed: list[dict], key: tuple, args, verify) -> dict[str, dict]:
    """{id: right trajectory} for those of the failed rollouts, one a prompt, that can be
    recovered."""
    problems = [PROBLEMS[r["id"]] for r in failed]
    hinted = [p | {"problem": with_hint(p, revise.guide_of(p), args),
                   "problem_fields": p} for p in problems]  # what a verifier gets
    hinted = [p for p in hinted  # a hint may leave no room
              if len(rollout.prompt_ids(policy.tokenizer, p["problem"], args)) < policy.context]
    hinted = rollout.add_prompts(policy, hinted, args)
    groups = train_grpo.sample_groups(policy, hinted, (*key, "hint"), args, verify)
    plain = {r["id"]: {k: r[k] for k in ("prompt_ids", "sample")} for r in failed}
    right = [[r for r in group if r["reward"]][:1] for group in groups]
    return {r["id"]: r | plain[r["id"]] for some in right for r in some}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(__doc__, prog="python -m baselines.train_hint")
    parser.add_argument("--hint", type=hint_text, default=HINT,
                        help="follows the problem, with {answer}")
    own, rest = parser.parse_known_args(argv)
    return argparse.Namespace(**vars(train_grpo.get_args([*rest, "--revise"])) | vars(own))


def main(args: argparse.Namespace) -> None:
    PROBLEMS.update({p["id"]: p for p in rollout.read_problems(args.data, args)})
    train_grpo.recover = recover
    train_grpo.main(args)


if __name__ == "__main__":
    common.run_script(get_args, main)
