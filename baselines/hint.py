"""Two rivals of the revision that need no gradient: sample from another prompt, keep what is right,
and train on it as if it had been drawn from the plain one.

    python -m baselines.hint --model toy/sums_model --data out/rollouts/zero_hit.jsonl --out out/hint
    torchrun --nproc-per-node 8 -m baselines.hint --model Qwen/Qwen2.5-1.5B-Instruct \\
        --data out/rollouts/zero_hit.jsonl --out out/hint
    python -m baselines.hint --from perturbed --model toy/sums_model --data zero_hit.jsonl --out out/lope

--from hint       the prompt tells the gold answer, as L_guide of the revision does: rationalisation
                  (STaR, Zelikman et al. 2022, arXiv 2203.14465, Sec. 3.2)
--from perturbed  meaningless words before the prompt, no information: LoPE (arXiv 2605.05566)
--gold permuted   control of the first: the prompt tells the answer of another problem

Reads   problems, as rollout.py does: its zero_hit.jsonl.
Writes  rollouts.jsonl, in the fields of rollout.py (prompt_ids as sampled, with the hint);
        recovered.jsonl, the right ones with the plain prompt's ids: what train_sft.py takes;
        summary.json. The same command continues after a kill, as rollout.py does.

Differs from a revision: [q; response] holds no token that the policy drew in its failed rollout.
"""
import argparse
import json
import random

import revise
import rollout
from helpers import common, sampling
from helpers.common import UserError

LOREM = ["lorem", "ipsum", "dolor", "sit", "amet", "consectetur", "adipiscing", "elit", "sed", "do", "eiusmod",
         "tempor", "incididunt", "ut", "labore", "et", "dolore", "magna", "aliqua"]


def other_prompt(p: dict, answer: str, args: argparse.Namespace) -> str | list[dict]:
    """The problem as it is sampled from: with the hint after it, or meaningless words before it."""
    if args.start == "hint":
        return rollout.add_text(p["problem"], after=args.hint.replace("{answer}", answer))
    words = random.Random(sampling.row_key(args.seed, p["id"], "perturbed")).choices(LOREM, k=args.words)
    return rollout.add_text(p["problem"], before=" ".join(words).capitalize() + ".")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m baselines.hint", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_args(parser)
    parser.add_argument("--data", required=True, help="problems, JSONL: zero_hit.jsonl of rollout.py")
    parser.add_argument("--out", required=True, help="output folder")
    parser.add_argument("-n", "--n", type=int, default=8,
                        help="responses per problem: as many as a revision has continuations")
    parser.add_argument("--from", dest="start", default="hint", choices=["hint", "perturbed"],
                        help="what is sampled from instead of the plain prompt")
    parser.add_argument("--hint", default=rollout.HINT, help="follows the problem, with {answer}")
    parser.add_argument("--words", type=int, default=40, help="meaningless words of --from perturbed")
    parser.add_argument("--gold", default="true", choices=["true", "permuted"],
                        help="control: the hint tells another problem's answer")
    rollout.add_sampling_args(parser)
    rollout.add_problem_args(parser)
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError naming the flag."""
    rollout.check_sampling_args(args)
    for flag in ("n", "words"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)} is out of range")
    if "{answer}" not in args.hint:
        raise UserError(f"--hint {args.hint!r} has no {{answer}}")
    if args.start == "perturbed" and args.gold == "permuted":
        raise UserError("--gold permuted goes with --from hint, which tells an answer")


def main(args: argparse.Namespace) -> None:
    check_args(args)
    problems = rollout.read_problems(args.data, args)
    told = {p["id"]: p["answer"] for p in problems}
    if args.gold == "permuted":
        told = revise.permuted_answers(told, args.seed)
    device = common.pick_device(args)
    out = common.start_run(args.out, args, rollout.FREE, data_digest=common.file_digest(args.data))
    policy = common.load_model(args, device)

    # === sample from the other prompt: rollout.py's files, and its resume ===
    others = [p | {"problem": other_prompt(p, told[p["id"]], args)} for p in problems]
    rollout.run_rollouts(policy, others, args.n, out, args, args.start)

    # === the right ones, as if they had been drawn from the plain prompt ===
    if common.rank() == 0:
        verify = common.load_verifier(args.verifier)
        plain = {p["id"]: rollout.prompt_ids(policy.tokenizer, p["problem"], args) for p in problems}
        rows = common.read_jsonl(out / "rollouts.jsonl")
        recovered = [r | {"prompt_ids": plain[r["id"]]} for r in rows if r["reward"]]
        common.write_atomic(out / "recovered.jsonl", "".join(map(common.to_line, recovered)))
        summary = {"problems": len(problems), "n": args.n, "recovered_trajectories": len(recovered),
                   "recovered_prompts": len({r["id"] for r in recovered})}
        if args.gold == "permuted":  # how often the answer that was told is the one that is given
            summary["told_prompts"] = len({r["id"] for r in rows if verify(r["response"], told[r["id"]])})
        common.write_atomic(out / "summary.json", json.dumps(summary, indent=1) + "\n")
        print(f"{summary['recovered_prompts']} of {len(problems)} prompts recovered, {len(recovered)} trajectories")


if __name__ == "__main__":
    common.run_script(get_args, main)
