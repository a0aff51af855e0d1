"""Two rivals of the revision that need no gradient: sample from another prompt, keep what is right,
and train on it as if it had been drawn from the plain one.

    python -m baselines.hint --model toy/sums_model --data zero_hit.jsonl --out out/hint
    torchrun --nproc-per-node 8 -m baselines.hint --model Qwen/Qwen2.5-1.5B-Instruct \\
        --data out/rollouts/zero_hit.jsonl --out out/hint
    python -m baselines.hint --from perturbed --model toy/sums_model --data zero_hit.jsonl \\
        --out out/lope

--from hint       the prompt tells the gold answer, as L_guide of the revision does: rationalisation
                  (STaR, Zelikman et al. 2022, arXiv 2203.14465, Sec. 3.2)
--from perturbed  meaningless words before the prompt, no information: LoPE (arXiv 2605.05566)
--gold permuted   control of the first: the prompt tells the answer of another problem

Reads   problems, as rollout.py does: its zero_hit.jsonl.
Writes  rollouts.jsonl, in the fields of rollout.py (prompt_ids as sampled, with the hint);
        recovered.jsonl, the right ones with the plain prompt's ids: what train_sft.py takes;
        summary.json. The same command continues after a kill, as rollout.py does.

Differs from rollout.py: `other_prompt`, and what main keeps of the rollouts.
Differs from a revision: [q; response] holds no token that the policy drew in its failed rollout.
"""
import argparse
import json
import random
from pathlib import Path

import revise
import rollout
from helpers import common, sampling, verifying
from helpers.common import POSITIVE, UserError
from helpers.sampling import row_key

HINT = ("The correct answer is {answer}. Knowing it, solve the problem in your own way, "
        "step by step.")
LOREM = ["lorem", "ipsum", "dolor", "sit", "amet", "consectetur", "adipiscing", "elit", "sed", "do",
         "eiusmod", "tempor", "incididunt", "ut", "labore", "et", "dolore", "magna", "aliqua"]


def add_text(problem: str | list[dict], before: str = "", after: str = "") -> str | list[dict]:
    """A problem with lines before and after its text; of chat messages the last is meant."""
    if isinstance(problem, str):
        return "\n".join(filter(None, (before, problem, after)))
    last = problem[-1]
    return [*problem[:-1], last | {"content": add_text(last["content"], before, after)}]


def with_hint(p: dict, answer: str, args: argparse.Namespace) -> str | list[dict]:
    """The problem with --hint after it, which tells an answer."""
    return add_text(p["problem"], after=args.hint.replace("{answer}", answer))


def other_prompt(p: dict, answer: str, args: argparse.Namespace) -> str | list[dict]:
    """The problem as it is sampled from: with the hint after it, or meaningless words before it."""
    if args.start == "hint":
        return with_hint(p, answer, args)
    words = random.Random(row_key(args.seed, p["id"], "perturbed")).choices(LOREM, k=args.words)
    return add_text(p["problem"], before=" ".join(words).capitalize() + ".")


def hint_text(text: str) -> str:
    """An argparse type: of --hint."""
    if "{answer}" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} has no {{answer}}")
    return text


def keep_right(out: Path, problems: list[dict], told: dict[str, str], tokenizer, verify,
               args) -> None:
    """OUT/recovered.jsonl: the right rollouts, as if they had been drawn from the plain prompt; and
    OUT/summary.json. told: {id: the answer that its prompt told}."""
    rows = common.read_jsonl(out / "rollouts.jsonl")
    plain = {p["id"]: rollout.prompt_ids(tokenizer, p["problem"], args) for p in problems}
    recovered = [r | {"prompt_ids": plain[r["id"]]} for r in rows if r["reward"]]
    common.write_atomic(out / "recovered.jsonl", map(common.to_line, recovered))
    summary = {"problems": len(problems), "n": args.n, "recovered_trajectories": len(recovered),
               "recovered_prompts": len({r["id"] for r in recovered})}
    if args.gold == "permuted":  # how often the answer that was told is the one that is given
        asked = {p["id"]: p | {"answer": told[p["id"]]} for p in problems}
        given = {r["id"] for r in rows
                 if verify(r["response"], told[r["id"]], asked[r["id"]])}
        summary["told_prompts"] = len(given)
    common.write_atomic(out / "summary.json", json.dumps(summary, indent=1) + "\n")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(__doc__, prog="python -m baselines.hint")
    common.add_model_args(parser)
    parser.add_argument("--data", required=True, help="problems: zero_hit.jsonl of rollout.py")
    parser.add_argument("--out", required=True, help="output folder")
    parser.add_argument("-n", "--n", type=POSITIVE, default=8,
                        help="responses per problem: as many as a revision has continuations")
    parser.add_argument("--from", dest="start", default="hint", choices=["hint", "perturbed"],
                        help="what is sampled from instead of the plain prompt")
    parser.add_argument("--hint", type=hint_text, default=HINT,
                        help="follows the problem, with {answer}")
    parser.add_argument("--words", type=POSITIVE, default=40,
                        help="meaningless words of --from perturbed")
    parser.add_argument("--gold", default="true", choices=["true", "permuted"],
                        help="control: the hint tells another problem's answer")
    sampling.add_sampling_args(parser)
    rollout.add_problem_args(parser)
    verifying.add_verifier_args(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if args.start == "perturbed" and args.gold == "permuted":
        raise UserError("--gold permuted goes with --from hint, which tells an answer")
    problems = rollout.read_problems(args.data, args)
    told = {p["id"]: revise.guide_of(p) for p in problems} if args.start == "hint" else {}
    if args.gold == "permuted":
        if any("guide" in p for p in problems):
            raise UserError("--gold permuted: a problem has a guide, which is not another's answer")
        told = revise.permuted_answers(told, args.seed)
    device = common.pick_device(args)
    out = common.start_run(args.out, args, data_digest=common.file_digest(args.data))

    files = [out / name for name in ("rollouts.jsonl", "recovered.jsonl", "summary.json")]
    if not all(f.exists() for f in files):
        verify = verifying.from_args(args)
        policy = common.load_model(args, device)
        others = [p | {"problem": other_prompt(p, told.get(p["id"], ""), args),
                       "problem_fields": p} for p in problems]  # what a verifier gets
        rollout.run_rollouts(policy, others, verify, out, args, args.start)
        if common.rank() == 0:
            keep_right(out, problems, told, policy.tokenizer, verify, args)
    if common.rank() == 0:
        summary = json.loads((out / "summary.json").read_text())
        print(f"{summary['recovered_prompts']} of {summary['problems']} prompts recovered, "
              f"{summary['recovered_trajectories']} trajectories")


if __name__ == "__main__":
    common.run_script(get_args, main)
