r"""The toy world: running sums with a systematic slip, its tokenizer, its problem sets and its base model.

A controlled stand-in for "a model that can reason but rarely does". A problem is a start and several additions,
`29+4+3+9+6+4?`; a response writes every step and closes with a box: `29+4=33;33+3=36;36+9=35;... So the answer is
\boxed{35}.` In the base model's training text a step that crosses a ten forgets the carry with probability 0.8
(36+9=35), in a first pass only. The slip keeps the units digit, so the number of carries of a problem is the same
whatever slips, and it is the problem's difficulty: a first pass is right with probability 0.2^carries, and prompts with
4 carries or more are almost all zero-hit at N = 32. Of the texts, 40 % carry a request in the prompt
(` Check your work.`) and show, after the box or after any step, a reflective phrase (` Wait, let me recheck.`) and a
clean second pass. Without the request this is shown in 0.3 % of the texts.
So the model can correct itself and rarely does.

    python -m toy.sums data  --out DIR         train, hard, test_hard and test_easy .jsonl:
                                          {"id", "problem", "answer", "carries"}
    python -m toy.sums train --out toy/sums_model   the base model, from nothing (safetensors, tokenizer, run.json)
    python -m toy.sums check --model toy/sums_model measures what the base model does; prints one JSON object

The shipped model (run.json; 200 prompts a set, 32 samples): on >= 4 carries accuracy 0.17 % and 94 % zero-hit, unasked
reflection 0.22 %. Asked to check, it starts a second pass 99.8 % of the time, and the box is right in 91 % and the
whole pass in 89 %. Tried: a Qwen2 of the same size (see build_model).

words.py is a second world, made by the same code. A world is a module that has its own TRAINING, DIFFICULTY, HARD,
FIRST_PASS, PHRASES, STEP and JOIN, and parts, facts, is_sound, draw_problem and write_pass.

One process; every draw is a function of --seed. The problem sets and the training texts come from different hash
classes of the problem string, so no problem is in two of them.
"""
import argparse
import hashlib
import json
import platform
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from helpers import common, sampling
from verifier import verify

# Dimension key: B texts, T tokens (prompt and response), V rows of the embedding

THIS = sys.modules[__name__]

SLIP = 0.80  # probability that a carry is forgotten in a first pass
ASKED = 0.40  # share of training texts with a request to check
MISREAD = 0.01  # probability that a first pass misreads an addend
UNASKED = 0.003  # share of the other texts that check all the same: what the revision has to find
INSTRUCTED = 0.05  # share of training prompts that end with the usual instruction, which changes nothing
ADDITIONS = (2, 6)  # fewest and most additions of a problem
FIRST_PASS = (SLIP, MISREAD)
DIFFICULTY = "carries"  # field of the records that says how hard a problem is
HARD = 4  # carries from which a problem counts as hard
TRAINING = {"steps": 2400, "batch": 64, "lr": 3e-3}  # defaults of `train`

TEMPLATE = " So the answer is \\boxed{"  # the toy's c_tmpl for revise.py: its commonest closing, up to the answer
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
CLOSINGS = {  # text between the last sum and the box -> weight
    ". So the answer is": 96,
    ". The answer is": 1,
    ". The total is": 1,
    ". So it is": 1,
    ".\nBased on my current reasoning process, the final answer is": 1,  # the paper's template
}
JOINS = {";": 98, ",": 1, "\n": 1}  # between two steps -> weight; one token each, so that every step has six
REQUESTS = (" Check your work.", " Please check your answer.", " Verify each step.", " Double-check the result.",
            " Then go over it again.", " Be careful and recheck.")
REFLECTIONS = (" Wait, let me recheck.", " Hmm, let me verify each step.", " Actually, let me reconsider.",
               " Let me double-check that.", " Wait, that may be wrong.", " Hold on, I should go over it again.",
               " But let me make sure.")

UNK, PAD, START, EOS = "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PHRASES = [*JOINS]  # what the texts hold beside the phrases of all worlds
# One alternative per kind of token, as byte-pair vocabularies have them: words carry their leading space,
# numbers do not.
PIECE = r" \\boxed\{|\}\.|\.\n| ?[A-Za-z-]+|[1-9]\d|[\s\S]"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STEP = re.compile(r"(?<![\d+=])(\d{1,9})\+(\d{1,9})=(\d{1,9})(?![\d+=])")
JOIN = re.compile(r"[;,\n]")
REFLECTION = re.compile(r"\b(wait|hmm|actually|hold on|recheck|reconsider|verify|double-check|make sure)\b",
                        re.IGNORECASE)
TAIL = re.compile(r"[^\d+=]*\\boxed\{(\d{1,9})\}[^\d+=]*")  # from last step to end: one box, no other arithmetic


# --- reading texts ---------------------------------------------------------------------------------------------------
def parts(problem: str) -> list[int]:
    """Start and addends of a problem text, [] when it is not one. Anything after the question mark is ignored."""
    found = re.match(r"\s*(\d{1,9}(?:\+\d{1,9})+)\?", problem)
    return [int(x) for x in found[1].split("+")] if found else []


def facts(problem: str) -> dict:
    """What the record of a problem says beside its text: the gold answer and the number of steps that cross a ten."""
    ns = parts(problem)
    return {"answer": str(sum(ns)), "carries": sum(sum(ns[:i]) % 10 + ns[i] >= 10 for i in range(1, len(ns)))}


def has_reflection(text: str) -> bool:
    """Does a response hold one of the reflective phrasings, whole or in part?"""
    return REFLECTION.search(text) is not None


def passes(text: str, world: ModuleType = THIS) -> list[list[re.Match]]:
    """The steps `a+b=c` of a response, their numbers as groups, one list per pass.

    Steps belong to one pass while only a join (`;`) stands between them. Anything else ends the pass, so that
    garbage inside a chain breaks it instead of being read over.
    """
    found, end = [], None
    for m in world.STEP.finditer(text):
        if end is None or not world.JOIN.fullmatch(text, end, m.start()):
            found.append([])
        found[-1].append(m)
        end = m.end()
    return found


def is_sound(problem: str, response: str) -> bool:
    """Is the last pass of the response a complete, right chain from the start over every addend to the boxed answer?

    Stricter than the verifier, which sees only the box:
    a response that jumps to the gold answer is right and not sound.
    """
    ns, found = parts(problem), passes(response)
    if not ns or not found:
        return False
    right = [[sum(ns[:i]), ns[i], sum(ns[: i + 1])] for i in range(1, len(ns))]
    tail = TAIL.fullmatch(response, found[-1][-1].end())
    return [[*map(int, m.groups())] for m in found[-1]] == right and tail is not None and int(tail[1]) == sum(ns)


# --- writing texts ---------------------------------------------------------------------------------------------------
def split_of(problem: str) -> str:
    """The hash class of a problem text: 'base' (60 %, the base model's own texts), 'train', 'hard', 'test_hard' or
    'test_easy' (10 % each). A function of the text alone, so the classes are disjoint whatever the seeds."""
    digit = int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8], "big") % 10
    return ("train", "hard", "test_hard", "test_easy")[digit] if digit < 4 else "base"


def draw_problem(rng: random.Random, split: str) -> str:
    """A problem of one hash class, such as `29+4+3+9?`. All sums stay below 100: no number needs a third digit."""
    while True:
        ns = [rng.randint(10, 49)] + [rng.randint(1, 9) for _ in range(rng.randint(*ADDITIONS))]
        problem = "+".join(map(str, ns)) + "?"
        if sum(ns) < 100 and split_of(problem) == split:
            return problem


def pick(rng: random.Random, weighted: dict[str, int]) -> str:
    """One key, drawn in proportion to its weight."""
    return rng.choices(list(weighted), list(weighted.values()))[0]


def write_pass(rng: random.Random, ns: list[int], slip: float = 0.0, misread: float = 0.0) -> tuple[str, int]:
    """One pass over the sum, `29+4=33;33+3=36`, and its last sum. A carry is forgotten with probability `slip`, an
    addend read as another with probability `misread`."""
    text, total = "", ns[0]
    for i, n in enumerate(ns[1:]):
        n = min(rng.randint(1, 9) if rng.random() < misread else n, 99 - total)  # sums stay below 100
        c = total + n
        if total % 10 + n >= 10 and rng.random() < slip:
            c -= 10
        text += (pick(rng, JOINS) if i else "") + f"{total}+{n}={c}"
        total = c
    return text, total


def write_text(world: ModuleType, rng: random.Random, problem: str, reflect: bool, slip: float) -> str:
    """A response: a first pass and its box; with `reflect` a clean second pass, after the box or from any step on.

    The second pass has to read the problem again: a first pass that was broken off or misread is no help to it.
    """
    read, first_pass = world.parts(problem), (slip, *world.FIRST_PASS[1:])
    if reflect and rng.random() < 0.5:
        # Parts read so far: doubts come at any step, and most often at the last
        stop = rng.choice([len(read), rng.randint(2, len(read))])
        text = world.write_pass(rng, read[:stop], *first_pass)[0] + "."
    else:
        text, total = world.write_pass(rng, read, *first_pass)
        text += f"{pick(rng, CLOSINGS)} \\boxed{{{total}}}."
    if not reflect:
        return text
    again, total = world.write_pass(rng, read)
    # A line break before the second pass: its first piece has no leading space, and ".\n" is one token
    return f"{text}{rng.choice(REFLECTIONS)}\n{again}{pick(rng, CLOSINGS)} \\boxed{{{total}}}."


def draw_example(world: ModuleType, rng: random.Random, unasked: float = UNASKED,
                 slip: float | None = None) -> tuple[str, str]:
    """One (user message, response) of the base model's training text. unasked: share of the texts without a request
    that check all the same; slip: probability of the world's own mistake, if not the world's."""
    problem = world.draw_problem(rng, "base")
    asked = rng.random() < ASKED
    response = write_text(world, rng, problem, asked or rng.random() < unasked,
                          world.FIRST_PASS[0] if slip is None else slip)
    message = problem + (rng.choice(REQUESTS) if asked else "")
    return message + (rng.choice("\n ") + INSTRUCTION if rng.random() < INSTRUCTED else ""), response


def draw_problems(world: ModuleType, seed: int, split: str, size: int, low: int, high: int) -> list[dict]:
    """`size` different problems of one hash class with a difficulty of `low` to `high`, as JSONL records."""
    rng, seen = random.Random(f"{seed}/{split}"), {}
    while len(seen) < size:
        problem = world.draw_problem(rng, split)
        known = world.facts(problem)
        if low <= known[world.DIFFICULTY] <= high:
            seen[problem] = known
    return [{"id": f"{split}-{i}", "problem": p, **known} for i, (p, known) in enumerate(seen.items())]


def problem_sets(world: ModuleType, seed: int) -> dict[str, list[dict]]:
    """The four problem sets, none with a request to check: {name: records}."""
    return {
        "train": draw_problems(world, seed, "train", 2000, 0, 99),
        "hard": draw_problems(world, seed, "hard", 600, world.HARD, 99),
        "test_hard": draw_problems(world, seed, "test_hard", 400, world.HARD, 99),
        "test_easy": draw_problems(world, seed, "test_easy", 400, 0, 2),
    }


# --- tokenizer, model, batches ---------------------------------------------------------------------------------------
def build_tokenizer(world: ModuleType) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose vocabulary is every piece of the world's texts. Decoding joins the pieces as they are."""
    phrases = [*CLOSINGS, *REQUESTS, *REFLECTIONS, *world.PHRASES, TEMPLATE, INSTRUCTION,
               "user\nassistant\nsystem +=?;}\n"]
    words = {piece for phrase in phrases for piece in re.findall(PIECE, phrase)}
    numbers = [*map(str, range(100))]
    vocab = [UNK, PAD, START, EOS, *numbers, *sorted(words.difference(numbers))]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(vocab)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=UNK, pad_token=PAD, eos_token=EOS, additional_special_tokens=[START],
        clean_up_tokenization_spaces=False, padding_side="left", model_max_length=1024)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.8 M parameters, fp32, tied embeddings. As in Qwen's own, the embedding has rows beyond the tokenizer
    (up to the next multiple of 32, at least one), which nothing may ever sample or pick.

    Not a Qwen2: transformers 5 gives every qwen2 folder Qwen2Tokenizer's splitting rules, whatever its tokenizer.json
    says, and those cut numbers into digits.
    """
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer) // 32 * 32 + 32, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=1024, rope_parameters={"rope_type": "default", "rope_theta": 500.0},  # texts are short
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    # Explicit and neutral: generate() would otherwise fill in its own top_k
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id,
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return model


def render(tokenizer: PreTrainedTokenizerFast, message: str) -> str:
    """The prompt that the pipeline builds for a user message, as text."""
    return tokenizer.apply_chat_template([{"role": "user", "content": message}], add_generation_prompt=True,
                                         tokenize=False)


def encode_batch(tokenizer: PreTrainedTokenizerFast, examples: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """(prompt + response + EOS ids, number of prompt ids) per example. Prompt and response are encoded apart, as they
    are when the response is sampled."""
    prompts = tokenizer([render(tokenizer, message) for message, _ in examples])["input_ids"]
    responses = tokenizer([response + EOS for _, response in examples])["input_ids"]
    return [(p + r, len(p)) for p, r in zip(prompts, responses, strict=True)]


def collate(rows: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, T), padded on the right, and labels (B, T): the ids of responses, -100 on prompts and padding."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])  # (B, T)
    t = torch.arange(width)
    start, end = torch.tensor([[p, len(ids)] for ids, p in rows])[:, :, None].unbind(1)  # (B, 1) each
    return ids, ids.masked_fill((t < start) | (t >= end), -100)


def batches(world: ModuleType, tokenizer: PreTrainedTokenizerFast, seed: int, count: int, size: int,
            *mix: float) -> Iterator:
    """`count` batches (ids, labels) of `size` fresh training texts; mix: as draw_example takes it. Texts are
    drawn 16 batches at a time and batched by length, which saves about a third of the time; the order of the batches is
    shuffled again."""
    for first in range(0, count, 16):
        rng = random.Random(f"{seed}/text/{first}")
        rows = encode_batch(tokenizer, [draw_example(world, rng, *mix) for _ in range(16 * size)])
        rows.sort(key=lambda row: len(row[0]))
        pool = [rows[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(pool)
        for chunk in pool[: count - first]:
            yield collate(chunk, tokenizer.pad_token_id)


def text_loss(model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats; denominator: the response tokens of the batch, EOS included. No attention mask is
    needed: attention is causal and the padding is on the right."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # (B, T-1, V)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def fit(world: ModuleType, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast,
        args: argparse.Namespace) -> float:
    """Trains in place; returns the mean loss of the last 50 steps (nats per response token)."""
    decay = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    warmup = min(100, args.steps // 10 + 1)
    ramp = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, warmup)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, args.steps - warmup), eta_min=0.02 * args.lr)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [ramp, cosine], [warmup])
    model.train()
    losses = []
    drawn = batches(world, tokenizer, args.seed, args.steps, args.batch, args.unasked, args.slip)
    bar = tqdm(drawn, total=args.steps, mininterval=5)
    for ids, labels in bar:
        loss = text_loss(model, ids, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}", refresh=False)
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


# --- measuring -------------------------------------------------------------------------------------------------------
def mean(xs: list) -> float | None:
    """Mean, rounded; denominator: the number of values, None when there is none."""
    return round(sum(xs) / len(xs), 5) if xs else None


def respond(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, messages: list[str],
            seed: int) -> list[list[int]]:
    """One sampled response (ids, EOS included) per user message, at temperature 1."""
    policy = common.Policy(model, tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    rows = []
    for i in range(0, len(messages), 512):
        prompts = [torch.tensor(tokenizer(render(tokenizer, m))["input_ids"]) for m in messages[i : i + 512]]
        keys = [[sampling.row_key(seed, "toy", i + j)] for j in range(len(prompts))]
        found = sampling.sample(policy, prompts, keys, [160] * len(prompts))
        rows += [sample.ids for (sample,) in found]
    return rows


def cut_from_chain(world: ModuleType, tokenizer: PreTrainedTokenizerFast, ids: list[int], rho: float) -> int:
    """Where the revision's cut floor(rho * tokens), EOS counted, falls from the last token of the first pass, in
    tokens: 0 right after it, 1 after its full stop, more inside the closing sentence, negative inside the chain."""
    text = tokenizer.decode(ids)
    end = max((m.end() for chain in passes(text, world)[:1] for m in chain), default=0)
    return int(rho * len(ids)) - len(tokenizer(text[:end])["input_ids"])


def measure(world: ModuleType, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, size: int,
            n: int) -> dict:
    """What the base model does on `size` held-out hard and easy prompts, `n` samples each, and once each when asked to
    check. Shares and accuracies are means over samples, zero_hit over prompts."""
    sets = {name: problem_sets(world, seed)[name][:size] for name in ("test_hard", "test_easy")}
    with torch.no_grad():  # seed + 1: texts that the training run has not drawn
        losses = [text_loss(model, *batch).item() for batch in batches(world, tokenizer, seed + 1, 16, 64)]
    report, unasked = {"prompts": size, "n": n, "loss_per_token": mean(losses)}, []
    for name, problems in sets.items():
        rows = respond(model, tokenizer, [p["problem"] for p in problems for _ in range(n)], seed)
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        right = [verify(text, problems[i // n]["answer"]) for i, text in enumerate(texts)]
        hits = [sum(right[i : i + n]) for i in range(0, len(right), n)]
        unasked += map(has_reflection, texts)
        report[name] = {
            "accuracy": mean(right), "zero_hit": mean([h == 0 for h in hits]),
            "mean_tokens": mean(list(map(len, rows))),
            "finished": mean([ids[-1] == tokenizer.eos_token_id for ids in rows]), (by := f"by_{world.DIFFICULTY}"): {}}
        for d in sorted({p[world.DIFFICULTY] for p in problems}):
            of = [h for h, p in zip(hits, problems, strict=True) if p[world.DIFFICULTY] == d]
            report[name][by][d] = {
                "prompts": len(of), "accuracy": mean([h / n for h in of]), "zero_hit": mean([h == 0 for h in of])}
        if name == "test_hard":
            cuts = [cut_from_chain(world, tokenizer, ids, 0.8) for ids in rows]
            report["cut"] = {"inside_closing": mean([c > 1 for c in cuts]),
                             "at_chain_end": mean([0 <= c <= 1 for c in cuts]),
                             "tokens_left": mean([len(ids) - int(0.8 * len(ids)) for ids in rows])}
    report["reflects_unasked"] = mean(unasked)
    asked, rng = [p for problems in sets.values() for p in problems], random.Random(f"{seed}/check")
    rows = respond(model, tokenizer, [p["problem"] + rng.choice(REQUESTS) for p in asked], seed)
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    report["asked"] = {
        "reflects": mean(list(map(has_reflection, texts))), "mean_tokens": mean(list(map(len, rows))),
        "right": mean([verify(text, p["answer"]) for text, p in zip(texts, asked, strict=True)]),
        "sound": mean([world.is_sound(p["problem"], text) for text, p in zip(texts, asked, strict=True)])}
    return report


# --- run -------------------------------------------------------------------------------------------------------------
def get_args(argv: list[str] | None = None, world: ModuleType = THIS) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=world.__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write the problem sets")
    data.add_argument("--out", required=True, help="folder for train, hard, test_hard and test_easy .jsonl")
    train = commands.add_parser("train", help="train a base model")
    train.add_argument("--out", required=True, help="folder for the model, the tokenizer and run.json")
    train.add_argument("--steps", type=int, default=world.TRAINING["steps"], help="optimizer steps")
    train.add_argument("--batch", type=int, default=world.TRAINING["batch"], help="texts per step")
    train.add_argument("--lr", type=float, default=world.TRAINING["lr"], help="peak learning rate")
    train.add_argument("--start", help="a base model to go on from; not given: from nothing")
    train.add_argument("--unasked", type=float, default=UNASKED, help="share of unasked texts that check all the same")
    train.add_argument("--slip", type=float, default=world.FIRST_PASS[0], help="how often a first pass errs")
    check = commands.add_parser("check", help="measure a trained base model")
    common.add_model_args(check)
    for command in (train, check):
        command.add_argument("-n", "--n", type=int, default=32, help="samples per prompt when measuring")
        command.add_argument("--prompts", type=int, default=200,
                             help="prompts per set when measuring, at most 400")
    for command in (data, train, check):
        command.add_argument("--seed", type=int, default=0, help="every draw is a function of it")
    return parser.parse_args(argv)


def main(args: argparse.Namespace, world: ModuleType = THIS) -> None:
    if args.command == "data":
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        for name, records in problem_sets(world, args.seed).items():
            common.write_atomic(out / f"{name}.jsonl", "".join(map(common.to_line, records)))
            total = sum(r[world.DIFFICULTY] for r in records)
            print(f"{out / name}.jsonl: {len(records)} problems, mean {world.DIFFICULTY} {total / len(records):.2f}")
        return

    if args.command == "check":
        model, tokenizer, *_ = common.load_model(args, common.pick_device(args))
        print(json.dumps(measure(world, model, tokenizer, args.seed, args.prompts, args.n), indent=1))
        return

    begin = time.time()
    tokenizer = build_tokenizer(world)
    model = Qwen3ForCausalLM.from_pretrained(args.start) if args.start else build_model(tokenizer, args.seed)
    loss = fit(world, model, tokenizer, args)
    seconds = time.time() - begin
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    run = {
        "command": f"python -m toy.{Path(world.__file__).stem} train --out {args.out} --steps {args.steps} "
                   f"--batch {args.batch} --lr {args.lr} --seed {args.seed} --unasked {args.unasked} "
                   f"--slip {args.slip}" + (f" --start {args.start}" if args.start else ""),
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "final_loss": round(loss, 5),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
    }
    run["measured"] = measure(world, model, tokenizer, args.seed, args.prompts, args.n) if args.prompts else None
    common.write_atomic(Path(args.out) / "run.json", json.dumps(run, indent=1) + "\n")
    print(json.dumps(run, indent=1))


if __name__ == "__main__":
    common.run_script(get_args, main)
