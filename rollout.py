"""Sample N responses to every problem, verify them, and find the zero-hit prompts (paper Sec. 3.1 and 4.1, dapo-hard).

    python rollout.py --model toy/sums_model --data problems.jsonl -n 32 --out out/rollouts
    torchrun --nproc-per-node 8 rollout.py --model Qwen/Qwen2.5-1.5B-Instruct --data dapo.jsonl -n 32 --out out/rollouts

Reads   problems: `id`, `problem` (a string, or a list of chat messages), `answer`; other names through flags.
Writes  rollouts.jsonl: `id`, `sample`, `prompt_ids`, `response_ids`, `response`, `finish` ("eos" or "length"),
        `reward`, `answer`; zero_hit.jsonl: the problems none of whose N responses passed;
        summary.json: the pass-rate histogram.

How a response is drawn, and why its text depends on (seed, problem id, sample number) alone, up to float32 rounding:
helpers/sampling.py. Processes claim problems from one list as their batches have room, so none waits for another, and
append what is finished to a part file each; killed at any moment, the same command samples what is missing, and the
files are the same but for such rounding: about two tokens in ten million.

Memory  --decode-tokens: the KV cache never holds more, so long responses are decoded in smaller batches (28 KB a
        token for Qwen2.5-1.5B in bfloat16, 144 KB for Qwen3-8B; and the weights). A pass over new prompts adds 8,192
        tokens at most. --decode-rows: the most sequences decoded together, which bounds the logits, size x vocabulary.

Differs from the paper: prompts with the instruction to use \\boxed{} (DAPO's "Answer:" wrapper is replaced); sampling
settings are these flags alone, never those of a checkpoint's generation_config.
"""
import argparse
import json
import math
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from jinja2 import TemplateError
from tqdm import tqdm

from helpers import common
from helpers.common import UserError

# What is not used here is for callers
from helpers.sampling import Row, Sample, decode, draw, filter_logits, new_cache, row_key, sample, uniforms  # noqa: F401

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
HINT = "The correct answer is {answer}. Knowing it, solve the problem in your own way, step by step."
PLAIN = "Question: {problem}\n{instruction}\nAnswer:"
DAPO = re.compile(r"\ASolve the following math problem step by step\. The last line of your response should be of the "
                  r"form Answer:.*?\n\n(.*?)\n\nRemember to put your answer on its own line after \"Answer:\"\.?\s*\Z",
                  re.DOTALL)


# --- problems and prompts --------------------------------------------------------------------------------------------
def read_problems(path: str, args: argparse.Namespace) -> list[dict]:
    """`id`, `problem`, `answer` of every line, renamed from the fields the flags name.

    Raises UserError naming path:line for what is missing, of the wrong type, empty or twice there.
    """
    problems, seen = [], {}
    for number, record in enumerate(common.read_jsonl(path, (args.problem_key, args.answer_key)), 1):
        problem, answer = record[args.problem_key], record[args.answer_key]
        where = f"{path}: record {number}"
        problem = clean_problem(problem, where)
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or (
                isinstance(answer, float) and not math.isfinite(answer)):
            raise UserError(f"{where}: {args.answer_key!r} is not a string or a number")
        if not str(answer).strip() or not problem:
            raise UserError(f"{where}: empty problem or answer")
        key = str(record.get(args.id_key, number))
        if key in seen:
            raise UserError(f"{where}: {args.id_key} {key!r} was used by record {seen[key]} already")
        seen[key] = number
        problems.append({"id": key, "problem": problem, "answer": str(answer)})
    if not problems:
        raise UserError(f"{path}: holds no problems")
    return problems[:args.limit] if args.limit else problems


def clean_problem(problem: object, where: str) -> str | list[dict]:
    """A problem without DAPO's wrapper. Raises UserError unless it is text or a list of chat messages."""
    if isinstance(problem, str):
        return (DAPO.match(problem) or [None, problem])[1]
    if not (isinstance(problem, list) and problem and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in problem)):
        raise UserError(f"{where}: the problem is neither a string nor a list of chat messages")
    wrapped = DAPO.match(problem[0]["content"]) if len(problem) == 1 else None  # as the hub file of DAPO has it
    return wrapped[1] if wrapped else problem


def check_ids(record: dict, vocab: int, where: str) -> None:
    """Raises UserError unless prompt_ids and response_ids are lists of token ids below vocab, neither empty."""
    for field in ("prompt_ids", "response_ids"):
        ids = record[field]
        if not (isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < vocab for i in ids)):
            raise UserError(f"{where}: {field!r} is not a list of token ids of --model, at least one")


def prompt_ids(tokenizer, problem: str | list[dict], args: argparse.Namespace) -> list[int]:
    """Token ids of a prompt: the tokenizer's chat template, or a plain one for models without (--prompt-format).

    A list of chat messages is used as it is; a string gets the instruction after it.
    """
    style = args.prompt_format
    if style == "auto":
        style = "chat" if tokenizer.chat_template else "plain"
    if style == "chat":
        if not tokenizer.chat_template:
            raise UserError("--prompt-format chat: the tokenizer of --model has no chat template")
        if isinstance(problem, str):
            problem = [{"role": "user", "content": f"{problem}\n{args.instruction}" if args.instruction else problem}]
    elif not isinstance(problem, str):
        raise UserError("--prompt-format plain: a problem made of chat messages needs a chat template")
    try:
        if style == "plain":
            return tokenizer(PLAIN.format(problem=problem, instruction=args.instruction))["input_ids"]
        text = tokenizer.apply_chat_template(problem, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    except (TemplateError, TypeError) as e:  # a role that the template refuses; a string that is not Unicode
        raise UserError(f"problem {str(problem)[:60]!r}: refused by the tokenizer of --model ({e})") from None


def add_text(problem: str | list[dict], before: str = "", after: str = "") -> str | list[dict]:
    """A problem with lines before and after its text; of chat messages the last is meant, which asks."""
    if isinstance(problem, str):
        return "\n".join(filter(None, (before, problem, after)))
    return [*problem[:-1], problem[-1] | {"content": add_text(problem[-1]["content"], before, after)}]


def add_prompts(policy: common.Policy, problems: list[dict], args: argparse.Namespace) -> None:
    """Give each problem its `prompt_ids` and `limit`, the response tokens its context leaves (<= --max-new-tokens)."""
    for p in problems:
        p["prompt_ids"] = prompt_ids(policy.tokenizer, p["problem"], args)
        if not 0 < len(p["prompt_ids"]) < policy.context:
            raise UserError(f"problem {p['id']!r} is {len(p['prompt_ids'])} tokens long, and the context of "
                            f"--model holds {policy.context}")
        p["limit"] = int(min(args.max_new_tokens, policy.context - len(p["prompt_ids"])))
        if 0 < args.decode_tokens < len(p["prompt_ids"]) + p["limit"]:
            raise UserError(f"--decode-tokens {args.decode_tokens}: problem {p['id']!r} and its longest response "
                            f"take {len(p['prompt_ids']) + p['limit']}")


# --- rollouts of a problem set ---------------------------------------------------------------------------------------
def sample_records(policy: common.Policy, rows: Iterable[tuple[dict, int]], verify, args, seed_parts: tuple,
                   slots: int) -> Iterator[list[dict]]:
    """Rollout records of (problem, sample number) pairs, in lists of those that finish together; row keys are
    (*seed_parts, id, sample). Pairs are taken as slots become free; those of one problem should follow each other."""
    def queue() -> Iterator[Row]:
        problem = None
        for p, number in rows:
            if p is not problem:
                problem, prompt = p, torch.tensor(p["prompt_ids"])  # one tensor for its samples: one prefill
            yield Row(prompt, row_key(*seed_parts, p["id"], number), p["limit"], (p, number))

    for finished in decode(policy, queue(), slots=slots, max_tokens=args.decode_tokens,
                           temperature=args.temperature, top_k=args.top_k, top_p=args.top_p):
        records = []
        for row in finished:
            p, number = row.tag
            text = policy.tokenizer.decode(row.ids, skip_special_tokens=True)
            records.append({"id": p["id"], "sample": number, "prompt_ids": p["prompt_ids"], "response_ids": row.ids,
                            "response": text, "finish": row.finish, "reward": int(bool(verify(text, p["answer"]))),
                            "answer": p["answer"]})
        yield records


def outcome(record: dict) -> tuple[int, str, int]:
    return record["reward"], record["finish"], len(record["response_ids"])


def read_outcomes(path: Path) -> dict[tuple[str, int], tuple[int, str, int]]:
    """{(id, sample): (reward, finish, tokens)} of a rollouts.jsonl."""
    return {key: kept for key, (_, _, _, kept) in common.scan([path], outcome).items()}


class Progress:
    """Rank 0's bar over the work of all ranks, which add theirs to shared counters once a second.
    done: {(id, sample): reward} of what earlier runs finished."""

    def __init__(self, problems: list[dict], n: int, done: dict, label: str):
        self.bar = tqdm(total=len(problems) * n, initial=len(done), desc=label, unit="rollout",
                        disable=common.rank() > 0)
        self.hits = {p["id"]: [done[p["id"], s] for s in range(n) if (p["id"], s) in done] for p in problems}
        self.n, self.start, self.shown = n, time.time(), 0.0
        full = [h for h in self.hits.values() if len(h) == n]
        # rollouts, tokens (of this run alone), hits, problems with all their rollouts, those of them without a hit
        self.before = [len(done), 0, sum(map(sum, self.hits.values())), len(full), sum(not any(h) for h in full)]
        self.counters, self.mine = [common.Counter() for _ in self.before], [0] * len(self.before)

    def add(self, records: list[dict]) -> None:
        for r in records:
            hits = self.hits[r["id"]]
            hits.append(r["reward"])
            full = len(hits) == self.n  # never true of a problem that ranks share: the bar alone misses it
            change = 1, len(r["response_ids"]), r["reward"], full, full and not any(hits)
            self.mine = [a + b for a, b in zip(self.mine, change)]
        if time.time() - self.shown > 1:
            self.show()

    def show(self) -> None:
        rollouts, tokens, hits, full, zero = (b + c.add(m) for b, c, m in zip(self.before, self.counters, self.mine))
        self.mine, self.shown = [0] * len(self.mine), time.time()
        self.bar.n = rollouts
        # denominators: seconds of this run; rollouts so far
        self.bar.set_postfix_str(f"{tokens / (time.time() - self.start):.0f} tok/s, "
                                 f"pass {hits / max(rollouts, 1):.3f}, zero-hit {zero}/{full}")


def run_rollouts(policy: common.Policy, problems: list[dict], n: int, out: Path, args, label: str) -> dict:
    """Sample and verify n responses to every problem into out/rollouts.jsonl; returns its outcomes.

    Each rank appends what it finishes to its own part file; what is there already is not sampled again. When all is
    done rank 0 merges the parts in problem order. Safe to kill at any moment.
    """
    final = out / "rollouts.jsonl"
    if final.exists():
        common.remove_parts(out, "rollouts")
        found = read_outcomes(final)
        if found.keys() != {(p["id"], s) for p in problems for s in range(n)}:  # it was cut or edited: never in a run
            raise UserError(f"{final}: does not hold {n} rollouts of each problem; remove it, "
                            "and they are sampled again")
        return found
    verify = common.load_verifier(args.verifier)
    add_prompts(policy, problems, args)
    part, done = common.open_part(out, "rollouts", outcome)
    todo = [(p, [s for s in range(n) if (p["id"], s) not in done]) for p in problems]
    # No more slots than a rank's share of the rows: else the first ranks would take all of a small set
    slots = min(args.decode_rows, max(1, math.ceil((len(problems) * n - len(done)) / common.world_size())))
    pieces = [(p, numbers[i:i + slots]) for p, numbers in todo for i in range(0, len(numbers), slots)]
    claims = common.Counter()

    def claimed() -> Iterator[tuple[dict, int]]:
        """The next piece that no rank has claimed, each time this rank's batch has room."""
        while (i := claims.add(1) - 1) < len(pieces):
            p, numbers = pieces[i]
            yield from ((p, s) for s in numbers)

    progress = Progress(problems, n, {key: reward for key, (_, _, _, (reward, _, _)) in done.items()}, label)
    for records in sample_records(policy, claimed(), verify, args, (args.seed,), slots):
        common.append_jsonl(part, records)
        progress.add(records)
    progress.show()  # everybody's remainder, before rank 0 reads the sums
    common.barrier()
    progress.show()
    progress.bar.close()
    common.merge_parts(out, "rollouts", {p["id"]: i for i, p in enumerate(problems)})
    return read_outcomes(final)


def summarise(problems: list[dict], n: int, found: dict) -> dict:
    """Pass rate, lengths and the histogram {hits: problems}; its entry 0 counts the zero-hit prompts."""
    hits = [sum(found[p["id"], s][0] for s in range(n)) for p in problems]
    count = len(problems) * n  # rollouts
    return {"problems": len(problems), "n": n, "pass_rate": sum(hits) / count, "zero_hit": hits.count(0),
            "mean_tokens": sum(f[2] for f in found.values()) / count,
            "truncated": sum(f[1] == "length" for f in found.values()) / count,
            "histogram": {h: hits.count(h) for h in range(n + 1) if h in hits}}


def add_sampling_args(parser: argparse.ArgumentParser, max_new_tokens: int = 8192) -> None:
    """Flags of every stage that samples; eval.py has the paper's longer limit."""
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens,
                        help="[Table 7] longest response, in tokens: 8,192 in training, 32,000 in evaluation")
    parser.add_argument("--temperature", type=float, default=1.0, help="[ours] the paper names none; 0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="[ours] 1 is off")
    parser.add_argument("--top-k", type=int, default=0, help="[ours] 0 is off")
    parser.add_argument("--seed", type=int, default=0, help="[ours] all random numbers are functions of it")
    parser.add_argument("--verifier", default="verifier.py:verify", help="[ours] path.py:function(response, gold)")
    parser.add_argument("--limit", type=int, default=0, help="[ours] only the first so many problems; 0 for all")
    parser.add_argument("--decode-rows", type=int, default=64, help="[ours] most sequences decoded together")
    parser.add_argument("--decode-tokens", type=int, default=2**18, help="[ours] most tokens in the KV cache, "
                        "prompts and responses: the memory flag; 0 is no bound")


def add_problem_args(parser: argparse.ArgumentParser) -> None:
    """Flags of every stage that reads problems and samples responses to them."""
    parser.add_argument("--instruction", default=INSTRUCTION, help="[ours] follows every problem; '' for none")
    parser.add_argument("--prompt-format", default="auto", choices=["auto", "chat", "plain"],
                        help="[ours] auto: the tokenizer's chat template where it has one")
    parser.add_argument("--id-key", default="id", help="[ours] field of a problem's id (line number if it has none)")
    parser.add_argument("--problem-key", default="problem", help="[ours] field of the problem")
    parser.add_argument("--answer-key", default="answer", help="[ours] field of the gold answer")


def check_sampling_args(args: argparse.Namespace) -> None:
    """Raises UserError naming the flag that is out of range."""
    for flag, good in {"temperature": args.temperature >= 0, "top_p": 0 < args.top_p <= 1, "top_k": args.top_k >= 0,
                       "max_new_tokens": args.max_new_tokens > 0, "limit": args.limit >= 0,
                       "decode_rows": args.decode_rows > 0, "decode_tokens": args.decode_tokens >= 0}.items():
        if not good:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is out of range")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_args(parser)
    parser.add_argument("--data", required=True, help="[ours] problems, JSONL")
    parser.add_argument("--out", required=True, help="[ours] output folder")
    parser.add_argument("-n", "--n", type=int, default=32,
                        help="[Sec. 4.1] responses per problem: zero-hit means pass@32 = 0")
    add_sampling_args(parser)
    add_problem_args(parser)
    return parser.parse_args(argv)


FREE = ("device", "decode_rows", "decode_tokens")  # these change a result by float32 rounding alone


def main(args: argparse.Namespace) -> dict:
    check_sampling_args(args)
    if args.n < 1:
        raise UserError(f"--n {args.n} is out of range")
    problems = read_problems(args.data, args)
    device = common.pick_device(args)
    out = common.start_run(args.out, args, FREE, data_digest=common.file_digest(args.data))
    policy = common.load_model(args, device)
    found = run_rollouts(policy, problems, args.n, out, args, "rollout")
    summary = summarise(problems, args.n, found)
    if common.rank() == 0:
        zero = [p for p in problems if not any(found[p["id"], s][0] for s in range(args.n))]
        common.write_atomic(out / "zero_hit.jsonl", "".join(
            common.to_line({k: p[k] for k in ("id", "problem", "answer")}) for p in zero))
        common.write_atomic(out / "summary.json", json.dumps(summary, indent=1) + "\n")
        print(f"{summary['problems']} problems x {args.n}: pass rate {summary['pass_rate']:.4f}, zero-hit "
              f"{summary['zero_hit']} ({summary['zero_hit'] / len(problems):.1%}), mean length "
              f"{summary['mean_tokens']:.1f} tokens, cut off {summary['truncated']:.1%}")
        print("  hits of", args.n, "-> problems: ", "  ".join(f"{h}:{c}" for h, c in summary["histogram"].items()))
    return summary


if __name__ == "__main__":
    common.run_script(get_args, main)
