"""Sample N responses to every problem, verify them, and find the zero-hit prompts (paper Sec. 3.1 and 4.1, dapo-hard).

    python rollout.py --model toy_model --data problems.jsonl -n 32 --out out/rollouts
    torchrun --nproc-per-node 8 rollout.py --model Qwen/Qwen2.5-1.5B-Instruct --data dapo.jsonl -n 32 --out out/rollouts

Reads   problems: `id`, `problem` (a string, or a list of chat messages), `answer`; other names through flags.
Writes  rollouts.jsonl: `id`, `sample`, `prompt_ids`, `response_ids`, `response`, `finish` ("eos" or "length"), `reward`,
        `answer`; zero_hit.jsonl: the problems none of whose N responses passed; summary.json: the pass-rate histogram.

`sample` is the one sampling function of the project: every stage calls it. A row's text depends on its key and nothing
else: not on the batch it is in, its neighbours, the number of processes or a restart (float32; see `uniforms`).

Differs from the paper: prompts with the instruction to use \\boxed{} (DAPO's "Answer:" wrapper is replaced); sampling
settings are these flags alone, never those of a checkpoint's generation_config.
"""
import argparse
import hashlib
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import common
from common import UserError

# Dimension key: P prompts, B sequences (rows), T time, V vocabulary, D model width

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
PLAIN = "Question: {problem}\n{instruction}\nAnswer:"
DAPO = re.compile(r"\ASolve the following math problem step by step\. The last line of your response should be of the form "
                  r"Answer:.*?\n\n(.*?)\n\nRemember to put your answer on its own line after \"Answer:\"\.?\s*\Z", re.DOTALL)


# --- sampling --------------------------------------------------------------------------------------------------------
@dataclass
class Sample:
    """One response. ids ends with the end-of-sequence id where finish is "eos"; logprobs are those of the sampling
    distribution (temperature and filters included), one per id."""
    ids: list[int]
    logprobs: list[float]
    finish: str


def row_key(*parts: object) -> int:
    """A 63-bit key for the random numbers of one row, from (seed, id, sample, ...)."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniforms(keys: Tensor, position: int) -> Tensor:
    """One float32 uniform in [0, 1) per row, (B,): a hash of (row key, position), so no generator has a state to lose.

    splitmix64 (Steele et al. 2014) in wrapping int64 arithmetic; `& mask` makes the right shifts logical.
    """
    x = keys + (((position + 1) * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63)
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return ((x >> 40) & 0xFFFFFF).float() / 2**24  # 24 bits fill a float32 mantissa exactly


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """(B, V) with all but the top-k, then all but the smallest set with probability >= top-p, at -inf."""
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # the mass before a token already reaches top_p; the first is always kept
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return logits


def draw(logits: Tensor, u: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Tokens (B,) and their log-probabilities (B,) from logits (B, V) and uniforms (B,), by inverse CDF.

    temperature 0 is greedy; its log-probability is that of the unfiltered softmax.
    """
    logits = logits.float()
    if temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    logits = filter_logits(logits / temperature, top_k, top_p)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()  # (B, V), unnormalised probabilities
    cdf = weights.cumsum(-1)
    total = cdf[:, -1:]
    # right=True: the first entry beyond u*total, so that a token of probability 0 is never drawn, not even at u = 0
    token = torch.searchsorted(cdf, u[:, None] * total, right=True)
    token = token.clamp_(max=logits.shape[-1] - 1)
    return token[:, 0], (weights.gather(1, token) / total).log()[:, 0]


class GrowingLayer(DynamicLayer):
    """A layer of the KV cache with room to grow: appending a token writes that token. Transformers' own layer concatenates,
    which copies the whole cache at every step and is most of the time of a small model."""

    def __init__(self):
        super().__init__()
        self.buffers: list[Tensor] = []  # keys and values, (B, heads, room, head_dim); self.keys and .values are views

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self.buffers or end > self.buffers[0].shape[-2]:
            room = end + max(64, end // 4)
            buffers = [x.new_empty(*x.shape[:2], room, x.shape[3]) for x in (key_states, value_states)]
            if start:
                buffers[0][:, :, :start], buffers[1][:, :, :start] = self.keys, self.values
            self.buffers = buffers
        self.buffers[0][:, :, start:end], self.buffers[1][:, :, start:end] = key_states, value_states
        self.keys, self.values = (b[:, :, :end] for b in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # makes new keys and values, without room
        self.buffers = []


def new_cache(config) -> DynamicCache:
    """An empty KV cache for a model: growing where attention is full, Transformers' own layers where it slides."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@torch.no_grad()
def sample(model, prompts: list[Tensor], keys: list[list[int]], limits: list[int], *, eos: list[int], vocab: int,
           temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> list[list[Sample]]:
    """Responses to P prompts, len(keys[p]) of them to prompt p, at most limits[p] tokens each.

    prompts: each (T,) token ids or (T, D) input embeddings, T >= 1. keys: one row key per response (`row_key`).
    vocab: ids at or beyond it are never produced. A prompt is prefilled once and its cache expanded; finished rows
    leave the batch when a quarter of it is done. Returns the samples in the order of keys.
    """
    device = model.device
    embed = model.get_input_embeddings()
    prompts = [p.to(device) if p.is_floating_point() else embed(p.to(device)) for p in prompts]
    width = max(len(p) for p in prompts)
    x = torch.zeros(len(prompts), width, prompts[0].shape[-1], dtype=embed.weight.dtype, device=device)  # (P, T, D)
    mask = torch.zeros(len(prompts), width, dtype=torch.long, device=device)  # (P, T), left-padded
    for i, p in enumerate(prompts):
        x[i, width - len(p):] = p
        mask[i, width - len(p):] = 1
    # explicit positions: with left padding the model's own arange would be silently wrong
    out = model(inputs_embeds=x, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                past_key_values=new_cache(model.config), use_cache=True, logits_to_keep=1)

    of_prompt = torch.tensor([i for i, k in enumerate(keys) for _ in k], device=device)  # (B,)
    cache = out.past_key_values
    cache.batch_select_indices(of_prompt)
    logits, mask = out.logits[of_prompt, -1], mask[of_prompt]  # (B, V), (B, T)
    position = mask.sum(-1)  # (B,), position of the next token
    row_keys = torch.tensor([k for ks in keys for k in ks], device=device)
    row_limits = torch.tensor(limits, device=device)[of_prompt]
    rows = torch.arange(len(of_prompt), device=device)  # which response each row of the batch is
    stops = torch.tensor(eos, device=device)
    steps = int(row_limits.max())
    tokens = torch.zeros(len(rows), steps, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(rows), steps, device=device)
    length = row_limits.clone()  # (B,), until an end-of-sequence id says otherwise
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)

    for t in range(steps):
        token, logprob = draw(logits[:, :vocab], uniforms(row_keys[rows], t), temperature, top_k, top_p)
        tokens[rows, t], logprobs[rows, t] = token, logprob
        ended = torch.isin(token, stops)
        length[rows] = torch.where(ended & ~done, length[rows].clamp(max=t + 1), length[rows])
        done = done | ended | (t + 1 >= row_limits[rows])
        alive = len(done) - int(done.sum())
        if alive == 0:
            break
        if alive <= 0.75 * len(done):
            keep = (~done).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, token, mask, position, done = rows[keep], token[keep], mask[keep], position[keep], done[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = model(input_ids=token[:, None], attention_mask=mask, position_ids=position[:, None],
                       past_key_values=cache, use_cache=True).logits[:, -1]
        position = position + 1

    if logprobs.isnan().any():  # of damaged weights, or of an overflow; searchsorted would pick the last token
        raise UserError("--model: its logits are not numbers")
    tokens, logprobs, length = tokens.tolist(), logprobs.tolist(), length.tolist()
    flat = [Sample(i[:n], p[:n], "eos" if i[n - 1] in eos else "length") for i, p, n in zip(tokens, logprobs, length)]
    responses = iter(flat)
    return [[next(responses) for _ in ks] for ks in keys]


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
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in problem)):
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


def add_prompts(problems: list[dict], model, tokenizer, args: argparse.Namespace) -> None:
    """Give each problem its `prompt_ids` and `limit`, the response tokens its context leaves (<= --max-new-tokens)."""
    context = common.context_length(model)
    for p in problems:
        p["prompt_ids"] = prompt_ids(tokenizer, p["problem"], args)
        if not 0 < len(p["prompt_ids"]) < context:
            raise UserError(f"--data: problem {p['id']!r} is {len(p['prompt_ids'])} tokens long, and the context of "
                            f"--model holds {context}")
        p["limit"] = int(min(args.max_new_tokens, context - len(p["prompt_ids"])))


# --- rollouts of a problem set ---------------------------------------------------------------------------------------
def make_batches(problems: list[dict], n: int, size: int) -> list[list[tuple[dict, list[int]]]]:
    """All (problem, sample numbers) in batches of at most `size` rows. A function of the data and the size alone: not of
    the processes or of what is done already, so that a continued run computes with the very same batches."""
    batches, rows = [[]], 0
    for p in problems:
        for start in range(0, n, size):
            numbers = list(range(start, min(start + size, n)))
            if rows + len(numbers) > size:
                batches.append([])
                rows = 0
            batches[-1].append((p, numbers))
            rows += len(numbers)
    return [b for b in batches if b]  # no problems, no batch: a process may have none


def sample_batch(model, tokenizer, vocab: int, batch: list, verify, args, seed_parts: tuple) -> list[dict]:
    """Rollout records of one batch of (problem, sample numbers); row keys are (*seed_parts, id, sample)."""
    eos = common.eos_ids(model, tokenizer)
    responses = sample(model, [torch.tensor(p["prompt_ids"]) for p, _ in batch],
                       [[row_key(*seed_parts, p["id"], s) for s in numbers] for p, numbers in batch],
                       [p["limit"] for p, _ in batch], eos=eos, vocab=vocab, temperature=args.temperature,
                       top_k=args.top_k, top_p=args.top_p)
    records = []
    for (p, numbers), samples in zip(batch, responses):
        for number, s in zip(numbers, samples):
            text = tokenizer.decode(s.ids, skip_special_tokens=True)
            records.append({"id": p["id"], "sample": number, "prompt_ids": p["prompt_ids"], "response_ids": s.ids,
                            "response": text, "finish": s.finish, "reward": int(bool(verify(text, p["answer"]))),
                            "answer": p["answer"]})
    return records


def outcome(record: dict) -> tuple[int, str, int]:
    return record["reward"], record["finish"], len(record["response_ids"])


def read_outcomes(path: Path) -> dict[tuple[str, int], tuple[int, str, int]]:
    """{(id, sample): (reward, finish, tokens)} of a rollouts.jsonl."""
    return {key: kept for key, (_, _, _, kept) in common.scan([path], outcome).items()}


def run_rollouts(model, tokenizer, vocab: int, problems: list[dict], n: int, out: Path, args, label: str) -> dict:
    """Sample and verify n responses to every problem into out/rollouts.jsonl; returns its outcomes.

    Each rank appends whole batches to its own part file; what is there already is not sampled again. When all is done
    rank 0 merges the parts in problem order. Safe to kill at any moment.
    """
    final = out / "rollouts.jsonl"
    if final.exists():
        common.remove_parts(out, "rollouts")
        found = read_outcomes(final)
        if found.keys() != {(p["id"], s) for p in problems for s in range(n)}:  # it was cut or edited: never in a run
            raise UserError(f"{final}: does not hold {n} rollouts of each problem; remove it, and they are sampled again")
        return found
    verify = common.load_verifier(args.verifier)
    add_prompts(problems, model, tokenizer, args)
    part, done = common.open_part(out, "rollouts", outcome)
    mine = make_batches(problems, n, args.batch_size)[common.rank()::common.world_size()]
    bar = tqdm(total=sum(len(s) for b in mine for _, s in b), desc=label, unit="rollout", disable=common.rank() > 0)
    tokens = hits = seen = 0
    start = time.time()
    for batch in mine:
        todo = {(p["id"], s) for p, numbers in batch for s in numbers} - done.keys()
        if todo:
            records = sample_batch(model, tokenizer, vocab, batch, verify, args, (args.seed,))
            records = [r for r in records if (r["id"], r["sample"]) in todo]
            common.append_jsonl(part, records)
            tokens += sum(len(r["response_ids"]) for r in records)
            hits += sum(r["reward"] for r in records)
            seen += len(records)
            bar.set_postfix_str(f"{tokens / (time.time() - start):.0f} tok/s, pass {hits / seen:.3f}", refresh=False)
        bar.update(sum(len(s) for _, s in batch))
    bar.close()
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


def add_problem_args(parser: argparse.ArgumentParser) -> None:
    """Flags of every stage that reads problems and samples responses to them."""
    parser.add_argument("--batch-size", type=int, default=64, help="[ours] sequences decoded together: the memory flag")
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
                       **({"batch_size": args.batch_size > 0} if hasattr(args, "batch_size") else {})}.items():
        if not good:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is out of range")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_args(parser)
    parser.add_argument("--data", required=True, help="[ours] problems, JSONL")
    parser.add_argument("--out", required=True, help="[ours] output folder")
    parser.add_argument("-n", "--n", type=int, default=32, help="[Sec. 4.1] responses per problem: zero-hit means pass@32 = 0")
    add_sampling_args(parser)
    add_problem_args(parser)
    return parser.parse_args(argv)


FREE = ("device", "batch_size")  # these do not change a result in float32


def main(args: argparse.Namespace) -> dict:
    check_sampling_args(args)
    if args.n < 1:
        raise UserError(f"--n {args.n} is out of range")
    problems = read_problems(args.data, args)
    device = common.pick_device(args)
    out = common.start_run(args.out, args, FREE, data_digest=common.file_digest(args.data))
    model, tokenizer, vocab = common.load_model(args, device)
    found = run_rollouts(model, tokenizer, vocab, problems, args.n, out, args, "rollout")
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
