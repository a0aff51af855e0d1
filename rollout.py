"""Sample N responses to every problem, verify them, and find the zero-hit prompts (Sec. 3.1, 4.1).

    python rollout.py --model toy/sums_model --data problems.jsonl -n 32 --out out/rollouts
    torchrun --nproc-per-node 8 rollout.py --model Qwen/Qwen2.5-1.5B-Instruct --data dapo.jsonl \\
        -n 32 --out out/rollouts

Reads   problems: `id`, `problem` (a string, or a list of chat messages), `answer`; other names
        through --fields. Another answer than text or a number is for a --verifier of your own;
        `guide` may then hold the text that revise.py steers toward. Other fields are kept.
Writes  rollouts.jsonl: `id`, `sample`, `prompt_ids`, `response_ids`, `response`, `finish` ("eos" or
        "length"), `reward`, `answer`, `guide` where the problem has it, and `problem_fields`, the
        whole problem, for a verifier that asks for it: verify(response, answer, problem);
        zero_hit.jsonl: the problems none of whose N responses passed, with all their fields;
        summary.json: the pass-rate histogram.

A response depends on (seed, problem id, sample number) alone, up to float32 rounding, about two
tokens in ten million (helpers/sampling.py). Processes claim problems from one list as their batches
have room, so none waits for another, and append what is finished to a part file each; killed at any
moment, the same command samples what is missing.

Memory  --decode-tokens: the KV cache never holds more (29 KB a token for Qwen2.5-1.5B in bfloat16,
        147 KB for Qwen3-8B), so long responses are decoded in smaller batches; a pass over new
        prompts adds 8,192 tokens, or one prompt. --decode-rows bounds logits, rows x vocabulary.

Differs from the paper: prompts with the instruction to use \\boxed{} (DAPO's "Answer:" wrapper is
replaced); sampling settings are these flags alone, never those of a checkpoint's generation_config.
"""
import argparse
import json
import math
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import TemplateError
from tqdm import tqdm

from helpers import common, sampling, verifying
from helpers.common import POSITIVE, Policy, UserError
from helpers.verifying import Verifier

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
PLAIN = "Question: {problem}\n{instruction}\nAnswer:"
DAPO = re.compile(
    r"\ASolve the following math problem step by step\. The last line of your response should be "
    r"of the form Answer:.*?\n\n(.*?)\n\nRemember to put your answer on its own line after "
    r"\"Answer:\"\.?\s*\Z", re.DOTALL)


# --- problems and prompts -------------------------------------------------------------------------
def read_problems(path: str, args: argparse.Namespace) -> list[dict]:
    """The records of a file, with `id`, `problem` and `answer` for the fields that --fields names.
    Raises UserError naming path and record for what is missing, of the wrong type, empty or twice
    there."""
    problems, seen, (key, problem, answer) = [], {}, args.fields
    for number, record in enumerate(common.read_jsonl(path, (problem, answer)), 1):
        where = f"{path}: record {number}"
        p = {"id": str(number if record.get(key) is None else record[key]),
             "problem": clean_problem(record[problem], where),
             "answer": clean_answer(record[answer], where, args)}
        if not p["problem"] or isinstance(p["answer"], str) and not p["answer"].strip():
            raise UserError(f"{where}: empty problem or answer")
        if not isinstance(record.get("guide", ""), str):
            raise UserError(f"{where}: 'guide' is not a string")
        if p["id"] in seen:
            raise UserError(f"{where}: {key} {p['id']!r} was used by record "
                            f"{seen[p['id']]} already")
        seen[p["id"]] = number
        others = record.keys() - {*p, *args.fields, "problem_fields"}  # which add_prompts sets
        problems.append(p | {k: v for k, v in record.items() if k in others})
    if not problems:
        raise UserError(f"{path}: holds no problems")
    return problems[:args.limit or None]


def clean_problem(problem: object, where: str) -> str | list[dict]:
    """A problem without DAPO's wrapper. Raises UserError unless it is text or chat messages."""
    if isinstance(problem, str):
        return (DAPO.match(problem) or [None, problem])[1]
    if not (isinstance(problem, list) and problem and all(
            isinstance(m, dict) and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str) for m in problem)):
        raise UserError(f"{where}: the problem is neither a string nor a list of chat messages")
    # The hub file of DAPO has one wrapped message
    wrapped = DAPO.match(problem[0]["content"]) if len(problem) == 1 else None
    return wrapped[1] if wrapped else problem


def clean_answer(answer: object, where: str, args: argparse.Namespace) -> object:
    """Text; a number as text; any other JSON value as it is, if it is not for verifier.py. Raises
    UserError."""
    if isinstance(answer, float) and not math.isfinite(answer):
        answer = None  # JSON has no such number
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    own = args.verifier != verifying.DEFAULT
    if answer is None or not isinstance(answer, str) and not own:
        raise UserError(f"{where}: {args.fields[2]!r} is not a string or a number")
    return answer


def check_ids(record: dict, vocab: int, where: str) -> None:
    """Raises UserError unless prompt_ids and response_ids are lists of token ids below vocab."""
    for field in ("prompt_ids", "response_ids"):
        ids = record[field]
        if not (isinstance(ids, list) and ids
                and all(type(i) is int and 0 <= i < vocab for i in ids)):
            raise UserError(f"{where}: {field!r} is not a list of token ids of --model, at least "
                            "one")


def prompt_ids(tokenizer, problem: str | list[dict], args: argparse.Namespace) -> list[int]:
    """Token ids of a prompt: the tokenizer's chat template, or a plain one for models without
    (--prompt-format). A string gets the instruction after it; chat messages are used as they are.
    """
    style = args.prompt_format
    if style == "auto":
        style = "chat" if tokenizer.chat_template else "plain"
    if style == "chat" and not tokenizer.chat_template:
        raise UserError("--prompt-format chat: the tokenizer of --model has no chat template")
    if style == "plain" and not isinstance(problem, str):
        raise UserError("--prompt-format plain: a problem made of chat messages needs a chat "
                        "template")
    try:
        if style == "plain":
            text = PLAIN.format(problem=problem, instruction=args.instruction)
            return tokenizer(text)["input_ids"]
        if isinstance(problem, str):
            text = "\n".join(filter(None, (problem, args.instruction)))
            problem = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(problem, tokenize=False, add_generation_prompt=True,
                                             date_string="26 Jul 2024")  # Llama's; not today
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    except (TemplateError, TypeError) as e:  # a role the template refuses; text that is not Unicode
        raise UserError(f"problem {str(problem)[:60]!r}: refused by the tokenizer of --model "
                        f"({e})") from None


def add_prompts(policy: Policy, problems: list[dict], args: argparse.Namespace) -> list[dict]:
    """The problems with `prompt_ids`, `response_limit` (--max-new-tokens, or fewer where the
    context leaves fewer), and `problem_fields`, the problem as it was, for the verifier."""
    found = []
    for p in problems:
        ids = prompt_ids(policy.tokenizer, p["problem"], args)
        if not 0 < len(ids) < policy.context:
            raise UserError(f"problem {p['id']!r} is {len(ids)} tokens long, and the context of "
                            f"--model holds {policy.context}")
        limit = int(min(args.max_new_tokens, policy.context - len(ids)))
        if 0 < args.decode_tokens < len(ids) + limit:
            raise UserError(f"--decode-tokens {args.decode_tokens}: problem {p['id']!r} and its "
                            f"longest response take {len(ids) + limit}")
        found.append({"problem_fields": p} | p | {"prompt_ids": ids, "response_limit": limit})
    return found


# --- rollouts of a problem set --------------------------------------------------------------------
def sample_records(policy: Policy, rows: Iterable[tuple[dict, int]], verify: Verifier, args,
                   seed_parts: tuple, slots: int) -> Iterator[list[dict]]:
    """Rollout records of (problem, sample number) pairs, in lists of those that finish together;
    row keys are (*seed_parts, id, sample). Pairs of one problem should follow each other."""
    def queue() -> Iterator[sampling.Row]:
        problem = None
        for p, number in rows:
            if p is not problem:  # one tensor for its samples: one prefill
                problem, prompt = p, torch.tensor(p["prompt_ids"])
            key = sampling.row_key(*seed_parts, p["id"], number)
            yield sampling.Row(prompt, key, p["response_limit"], (p, number))

    waiting = []  # for the verifier, which may work while the next tokens are drawn
    for finished in sampling.decode(policy, queue(), **sampling.settings(args) | {"slots": slots}):
        for row in finished:
            text, (p, _) = policy.tokenizer.decode(row.ids, skip_special_tokens=True), row.tag
            verdict = verify.submit(text, p["answer"], p["problem_fields"])
            waiting.append((row, text, verdict))
        done = [verdict.done() for _, _, verdict in waiting]
        judged = [x for x, d in zip(waiting, done) if d]
        waiting = [x for x, d in zip(waiting, done) if not d]
        yield [rollout_record(verify, *x) for x in judged if not x[2].exception()]
        for _, _, verdict in judged:
            verdict.result()  # raises what a verifier has raised: what is right is written by now
    for x in waiting:
        yield [rollout_record(verify, *x)]


def rollout_record(verify: Verifier, row: sampling.Row, text: str, verdict: Future) -> dict:
    """One line of rollouts.jsonl."""
    p, number = row.tag
    record = {"id": p["id"], "sample": number, "prompt_ids": p["prompt_ids"],
              "response_ids": row.ids, "response": text, "finish": row.finish,
              "reward": int(verdict.result()), "answer": p["answer"]}
    if "guide" in p:
        record["guide"] = p["guide"]
    if verify.takes_problem:
        record["problem_fields"] = p["problem_fields"]
    return record


class Outcome(NamedTuple):
    """What is kept in memory of a rollout."""
    reward: int
    finish: str
    tokens: int


def read_outcomes(path: Path) -> dict[tuple[str, int], Outcome]:
    """{(id, sample): Outcome} of a rollouts.jsonl."""
    keep = lambda r: Outcome(r["reward"], r["finish"], len(r["response_ids"]))
    return {key: place.kept for key, place in common.scan([path], keep).items()}


def run_rollouts(policy: Policy, problems: list[dict], verify: Verifier, out: Path, args,
                 label: str) -> dict[tuple[str, int], Outcome]:
    """Sample and verify args.n responses to every problem into out/rollouts.jsonl. Safe to kill at
    any moment: each rank appends what it finishes to its own part file, and what is there is not
    sampled again."""
    final, n = out / "rollouts.jsonl", args.n
    if final.exists():
        common.remove_parts(out, "rollouts")
        found = read_outcomes(final)
        if found.keys() != {(p["id"], s) for p in problems for s in range(n)}:  # cut or edited
            raise UserError(f"{final}: does not hold {n} rollouts of each problem; remove it, "
                            "and they are sampled again")
        return found
    problems = add_prompts(policy, problems, args)
    part, done = common.open_part(out, "rollouts")
    # No more slots than a rank's share: else the first ranks would take all of a small set
    missing = len(problems) * n - len(done)
    slots = min(args.decode_rows, max(1, math.ceil(missing / common.world_size())))
    todo = [(p, [s for s in range(n) if (p["id"], s) not in done]) for p in problems]
    pieces = [(p, some[i:i + slots]) for p, some in todo for i in range(0, len(some), slots)]
    claims, written = common.Counter(), common.Counter()

    def claimed() -> Iterator[tuple[dict, int]]:
        """The next piece that no rank has claimed, each time this rank's batch has room."""
        while (i := claims.add(1) - 1) < len(pieces):
            p, numbers = pieces[i]
            yield from ((p, s) for s in numbers)

    # The bar is rank 0's and counts the work of all; the pass rate is of what rank 0 has sampled
    hits = sampled = 0
    with tqdm(total=len(done) + missing, initial=len(done), desc=label, unit="rollout",
              disable=common.rank() > 0) as bar:
        for records in sample_records(policy, claimed(), verify, args, (args.seed,), slots):
            common.append_jsonl(part, records)
            hits, sampled = hits + sum(r["reward"] for r in records), sampled + len(records)
            bar.set_postfix_str(f"pass {hits / max(sampled, 1):.3f}", refresh=False)
            bar.update(len(done) + written.add(len(records)) - bar.n)
        common.barrier()
        bar.update(len(done) + written.add(0) - bar.n)
    common.merge_parts(out, "rollouts", {p["id"]: i for i, p in enumerate(problems)})
    return read_outcomes(final)


def hits_per_problem(problems: list[dict], n: int, found: dict) -> list[int]:
    """How many of the n rollouts of each problem passed."""
    return [sum(found[p["id"], s].reward for s in range(n)) for p in problems]


def summarise(hits: list[int], n: int, found: dict) -> dict:
    """Pass rate, lengths and the histogram {hits: problems}."""
    count = len(found)  # rollouts
    return {"problems": len(hits), "n": n, "pass_rate": sum(hits) / count,
            "zero_hit": hits.count(0),
            "mean_tokens": sum(x.tokens for x in found.values()) / count,
            "truncated": sum(x.finish == "length" for x in found.values()) / count,
            "histogram": {h: hits.count(h) for h in range(n + 1) if h in hits}}


# --- the stage ------------------------------------------------------------------------------------
def add_problem_args(parser: argparse.ArgumentParser) -> None:
    """Flags of every stage that reads problems and samples responses to them."""
    add = parser.add_argument_group("problems").add_argument
    add("--instruction", default=INSTRUCTION, help="follows every problem; '' for none")
    add("--prompt-format", default="auto", choices=["auto", "chat", "plain"],
        help="auto: the tokenizer's chat template where it has one")
    add("--fields", nargs=3, default=["id", "problem", "answer"],
        metavar=("ID", "PROBLEM", "ANSWER"),
        help="what a problem's file calls them; without an id it is the record's number")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(__doc__)
    common.add_model_args(parser)
    add = parser.add_argument
    add("--data", required=True, help="problems, JSONL")
    add("--out", required=True, help="output folder")
    add("-n", "--n", type=POSITIVE, default=32,
        help="[Sec. 4.1] responses per problem: zero-hit means pass@32 = 0")
    sampling.add_sampling_args(parser)
    add_problem_args(parser)
    verifying.add_verifier_args(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    problems = read_problems(args.data, args)
    device = common.pick_device(args)
    out = common.start_run(args.out, args, data_digest=common.file_digest(args.data))
    verify = verifying.from_args(args)
    policy = common.load_model(args, device)
    found = run_rollouts(policy, problems, verify, out, args, "rollout")
    if common.rank() == 0:
        hits = hits_per_problem(problems, args.n, found)
        summary = summarise(hits, args.n, found)
        zero = [p for p, h in zip(problems, hits) if h == 0]
        common.write_atomic(out / "zero_hit.jsonl", map(common.to_line, zero))
        common.write_atomic(out / "summary.json", json.dumps(summary, indent=1) + "\n")
        print(f"{summary['problems']} problems x {args.n}: pass rate {summary['pass_rate']:.4f}, "
              f"zero-hit {summary['zero_hit']} ({summary['zero_hit'] / len(problems):.1%}), "
              f"mean length {summary['mean_tokens']:.1f} tokens, cut off "
              f"{summary['truncated']:.1%}")
        histogram = "  ".join(f"{h}:{c}" for h, c in summary["histogram"].items())
        print(f"  hits of {args.n} -> problems:   {histogram}")


if __name__ == "__main__":
    common.run_script(get_args, main)
