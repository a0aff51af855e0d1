"""Draw responses from a model: a queue, a batch that stays full, random numbers of each row alone.

A row's random numbers depend on its key and nothing else (`uniforms`), and in float32 its text
neither on its batch, when it joined, the number of processes nor a restart, up to rounding: logits
of another batch shape differ in their last digits, and a uniform on a boundary of the CDF falls on
its other side (seen: two tokens in ten million with toy/sums_model, 64 slots against 7). The same
shapes give the same bits. Sampling settings are the arguments alone, never those of a checkpoint's
generation_config.

How the batch works. All live rows write their next key and value into the same column of one buffer
per layer, so a row occupies the columns start .. end-1 and everything before its start is masked;
with explicit positions it does not matter where it starts. A prompt is prefilled once, for all of
its responses that join together, and its keys are copied to the columns that end where the batch
is. A finished row's slot is taken by the last row at once: no step is spent on a row that is done.
"""
import argparse
import hashlib
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from helpers import common
from helpers.common import COUNT, POSITIVE, UserError, checked

# Dimension key: P prompts, B rows of the batch, C columns of the KV cache, T tokens of a prompt,
# V vocabulary, D model width

PREFILL_TOKENS = 8192  # in one pass, padding included; a longer prompt is a pass of its own
BLOCK = 256  # of the vocabulary, in `draw`


# --- random numbers and the draw ------------------------------------------------------------------
def row_key(*parts: object) -> int:
    """A 63-bit key for the random numbers of one row, from (seed, id, sample, ...)."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def uniforms(keys: Tensor, position: int | Tensor) -> Tensor:
    """One float32 uniform in [0, 1) per row, (B,): a hash of (row key, position of the token in its
    response). splitmix64 (Steele et al. 2014) in wrapping int64 arithmetic; `& mask` makes the
    right shifts logical."""
    x = keys + (torch.as_tensor(position) + 1) * (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return ((x >> 40) & 0xFFFFFF).float() / 2**24  # 24 bits fill a float32 mantissa exactly


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """(B, V), -inf beyond the top k, then beyond the smallest set with probability >= top_p."""
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # what is before reaches it; the first is always kept
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return logits


def draw(logits: Tensor, u: Tensor, temperature: float, top_k: int,
         top_p: float) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probabilities, (B,) each, from logits (B, V) and uniforms u (B,), by
    inverse CDF. temperature 0 is greedy; its log-probability is that of the unfiltered softmax."""
    logits = logits.float()
    if temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    logits = filter_logits(logits if temperature == 1 else logits / temperature, top_k, top_p)
    B, V = logits.shape
    weights = logits.new_empty(B, -(-V // BLOCK) * BLOCK)  # unnormalised, in whole blocks
    weights[:, V:] = 0
    torch.sub(logits, logits.amax(-1, keepdim=True), out=weights[:, :V])
    weights[:, :V].exp_()
    # The CDF at the end of every block, then inside the one that u falls into: float64 sums that a
    # GPU's parallel scan cannot leave out of order, in a fraction of the time of one scan over V
    weights = weights.view(B, -1, BLOCK)
    sums = weights.sum(-1).double()  # (B, blocks)
    cdf = sums.cumsum(-1)
    total = cdf[:, -1:]
    target = u[:, None] * total
    # right=True: the first entry beyond the target, so that probability 0 is never drawn, not even
    # at u = 0. Beyond the last entry only for nan
    block = torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[1] - 1)  # (B, 1)
    inside = weights[torch.arange(B, device=u.device), block[:, 0]]  # (B, BLOCK)
    cdf_inside = inside.double().cumsum(-1)
    rest = (target - cdf.gather(1, block) + sums.gather(1, block)).clamp(min=0)
    rest = torch.minimum(rest, cdf_inside[:, -1:] * (1 - 2**-40))  # sums is rounded
    token = torch.searchsorted(cdf_inside, rest, right=True).clamp_(max=BLOCK - 1)
    logprob = (inside.gather(1, token) / total).log().float()
    return (block * BLOCK + token)[:, 0], logprob[:, 0]


# --- rows and their queue -------------------------------------------------------------------------
@dataclass(eq=False)
class Row:
    """A response to draw and what is drawn of it so far."""
    prompt: Tensor  # token ids (T,) or input embeddings (T, D), T >= 1
    key: int
    limit: int  # tokens
    tag: object = None  # whatever the caller wants to know it by
    ids: list[int] = field(default_factory=list)  # with the end-of-sequence id, if it ends in one
    logprobs: list[float] = field(default_factory=list)  # temperature and filters included
    finish: str = ""  # "eos" or "length" once it is done
    start: int = 0  # its first column while it is in the batch

    def __len__(self) -> int:
        return len(self.prompt) + len(self.ids)


class Queue:
    """Rows that wait: those that were put back, then an iterator, asked no sooner than needed."""

    def __init__(self, rows: Iterable[Row]):
        self.rows, self.front, self.ended = iter(rows), deque(), False

    def peek(self) -> Row | None:
        if not self.front:
            self.front.extend(itertools.islice(self.rows, 1))
            self.ended = not self.front
        return self.front[0] if self.front else None

    def pop(self) -> Row:
        return self.front.popleft()

    def put_back(self, row: Row) -> None:
        self.front.appendleft(row)


# --- the batch and its KV cache -------------------------------------------------------------------
class SlotLayer(DynamicLayer):
    """A layer of the cache, written in place: Transformers' own concatenates, which copies the
    whole cache at every step and is most of the time of a small model. buffers: keys and values,
    each (slots, heads, room, head_dim)."""

    def __init__(self, batch: "Batch"):
        super().__init__()
        self.batch, self.buffers = batch, []

    def get_seq_length(self) -> int:
        return self.batch.end - self.batch.low

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, ...]:
        n, low, end = len(self.batch.rows), self.batch.low, self.batch.end
        for buffer, new in zip(self.buffers, (key_states, value_states)):
            buffer[:n, :, end:end + 1] = new
        return tuple(buffer[:n, :, low:end + 1] for buffer in self.buffers)


def new_cache(config) -> DynamicCache:
    """An empty KV cache that keeps every key: where attention slides, the model's own mask hides
    those out of sight. Raises UserError naming --model where a layer has another kind of state."""
    cache = DynamicCache(config=config)
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UserError(f"--model: {type(layer).__name__}, a layer without a KV cache")
    cache.layers = [DynamicLayer() for _ in cache.layers]
    return cache


class Batch:
    """The live rows and their keys and values: row i has columns rows[i].start .. end-1 of slot i.
    slots, max_tokens: as in `decode`."""

    def __init__(self, model, slots: int, max_tokens: int):
        self.model, self.slots, self.max_tokens = model, slots, max_tokens
        self.rows: list[Row] = []
        self.low = self.end = 0  # columns low .. end-1 are in use, `end` is written next
        self.size = self.room = 0  # slots and columns of the buffers
        self.last: Tensor | None = None  # token of every row (B,); None when rows came or went
        self.cache = new_cache(model.config)
        self.cache.layers = [SlotLayer(self) for _ in self.cache.layers]
        self.windowed = any(x.is_sliding for x in DynamicCache(config=model.config).layers)

    def fits(self, rows: int, columns: int) -> bool:
        """Whether the bounds allow so many rows of so many columns, with an eighth to grow: else a
        row that joins now would be put back soon. One row alone always fits."""
        grown = rows * (columns + columns // 8 + 1)
        return rows <= self.slots and (not self.max_tokens or rows == 1 or grown <= self.max_tokens)

    def admit(self, queue: Queue) -> list[Row]:
        """The next rows of the queue, with room made for them, when as many as an eighth of the
        batch fit in: a prefill each would cost more than free slots."""
        n, columns, fresh = len(self.rows), self.end - self.low, []
        while self.fits(n + (len(fresh) + 1 if fresh else max(1, n // 8)), columns):
            row = queue.peek()
            if row is None or not self.fits(n + len(fresh) + 1, max(columns, len(row))):
                break
            fresh.append(queue.pop())
            columns = max(columns, len(row))
        if fresh and (n + len(fresh) > self.size or columns > self.end):
            self.resize(n + len(fresh), columns, refill=not queue.ended)
        return fresh

    def make_room(self, queue: Queue) -> None:
        """For one more column. Where the bound forbids it the youngest rows are put back."""
        if self.end < self.room:
            return
        while not self.fits(len(self.rows), self.end - self.low):
            youngest = max(self.rows, key=lambda row: row.start)
            self.remove([youngest])
            queue.put_back(youngest)
        refill = bool(queue.front) or not queue.ended
        self.resize(len(self.rows), self.end - self.low, refill)

    def resize(self, rows: int, columns: int, refill: bool) -> None:
        """New buffers for at least so many rows and columns and one more, with room to grow; the
        columns left of every start are dropped. refill: whether more rows may come."""
        room = columns + max(64, columns // 4)
        size = self.slots if refill else rows
        if self.max_tokens:
            size = max(rows, min(size, self.max_tokens // room))
            room = max(columns + 1, min(room, self.max_tokens // size))
        n, span = len(self.rows), self.end - self.low
        for layer in self.cache.layers:  # one layer at a time: the others' memory is not held twice
            for i, old in enumerate(layer.buffers):
                # zeros: a masked column must hold a number, since 0 * nan is nan
                layer.buffers[i] = old.new_zeros(size, old.shape[1], room, old.shape[3])
                layer.buffers[i][:n, :, columns - span:columns] = old[:n, :, self.low:self.end]
        for row in self.rows:
            row.start += columns - self.end
        self.low, self.end, self.size, self.room = columns - span, columns, size, room
        self.columns = torch.arange(room, device=self.model.device)
        self.last = None

    def add(self, rows: list[Row], prefilled: DynamicCache, source: Tensor) -> None:
        """Fill free slots. rows[i] is the end of row source[i] of a prefilled cache."""
        n, k = len(self.rows), len(rows)
        for layer, new in zip(self.cache.layers, prefilled.layers):
            states = new.keys, new.values  # (P, heads, T, head_dim), left-padded
            layer.buffers = layer.buffers or [
                x.new_zeros(self.size, x.shape[1], self.room, x.shape[3]) for x in states]
            for buffer, x in zip(layer.buffers, states):
                buffer[n:n + k, :, self.end - x.shape[2]:self.end] = x[source]
        for row in rows:
            row.start = self.end - len(row)
        self.rows += rows
        self.low = min(row.start for row in self.rows)
        self.last = None

    def remove(self, gone: list[Row]) -> None:
        """Free the slots of some rows; the last rows move into them."""
        keep = len(self.rows) - len(gone)
        holes = [i for i in range(keep) if self.rows[i] in gone]
        movers = [i for i in range(keep, len(self.rows)) if self.rows[i] not in gone]
        if holes:
            for layer in self.cache.layers:
                for buffer in layer.buffers:
                    buffer[holes, :, self.low:self.end] = buffer[movers, :, self.low:self.end]
        for hole, mover in zip(holes, movers):
            self.rows[hole] = self.rows[mover]
        del self.rows[keep:]
        self.low = min((row.start for row in self.rows), default=self.end)
        self.last = None

    def remove_finished(self) -> list[Row]:
        done = [row for row in self.rows if row.finish]
        if done:
            self.remove(done)
        return done

    def forward(self) -> Tensor:
        """One step: the last token of every row goes in. Logits (B, V) of the next one."""
        if self.last is None:
            self.keys, self.drawn, self.position, self.start, self.last = torch.tensor(
                [[r.key, len(r.ids), len(r) - 1, r.start, r.ids[-1]] for r in self.rows],
                device=self.model.device).T  # (B,) each
        else:
            self.drawn, self.position = self.drawn + 1, self.position + 1
        mask = self.columns[self.low:self.end + 1] >= self.start[:, None]  # (B, C)
        # With four dimensions the model takes the mask as it is; only its own knows of a window
        mask = mask if self.windowed else mask[:, None, None]
        logits = self.model(
            input_ids=self.last[:, None], attention_mask=mask, position_ids=self.position[:, None],
            past_key_values=self.cache, use_cache=True).logits[:, -1]
        self.end += 1
        return logits


# --- sampling -------------------------------------------------------------------------------------
def prefill(model, rows: list[Row]) -> Iterator[tuple[list[Row], Tensor, DynamicCache, Tensor]]:
    """In passes of at most PREFILL_TOKENS: some of the rows, the logits (B, V) of their next token,
    the cache of their P distinct contexts, and which of these is whose, (B,). Rows that share a
    prompt tensor share its pass."""
    device, embed = model.device, model.get_input_embeddings()
    groups = {}
    for row in rows:
        groups.setdefault(id(row) if row.ids else id(row.prompt), []).append(row)
    length = lambda group: len(group[0])
    for batch in common.batches_by_length(list(groups.values()), length, PREFILL_TOKENS):
        firsts = [group[0] for group in batch]
        P, T = len(firsts), max(map(len, firsts))
        x = torch.zeros(P, T, embed.embedding_dim, dtype=embed.weight.dtype, device=device)
        mask = torch.zeros(P, T, dtype=torch.long, device=device)  # left-padded
        for i, row in enumerate(firsts):
            prompt = row.prompt.to(device)
            prompt = prompt if prompt.is_floating_point() else embed(prompt)
            drawn = embed(torch.tensor(row.ids, dtype=torch.long, device=device))
            x[i, T - len(row):] = torch.cat([prompt, drawn])
            mask[i, T - len(row):] = 1
        # explicit positions: with left padding the model's own arange would be silently wrong
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = model(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=True,
                    past_key_values=new_cache(model.config), logits_to_keep=1)
        source = torch.tensor([p for p, group in enumerate(batch) for _ in group], device=device)
        rows = [row for group in batch for row in group]
        yield rows, out.logits[source, -1], out.past_key_values, source


def extend(policy: common.Policy, rows: list[Row], logits: Tensor, keys: Tensor, drawn: Tensor,
           how: tuple[float, int, float]) -> Tensor:
    """The next token (B,) of rows that have `drawn` (B,) so far. how: temperature, top_k, top_p."""
    tokens, logprobs = draw(logits[:, :policy.vocab], uniforms(keys, drawn), *how)
    for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist()):
        if math.isnan(logprob):  # of damaged weights, or of an overflow
            raise UserError("--model: its logits are not numbers")
        row.ids.append(token)
        row.logprobs.append(logprob)
        if token in policy.eos or len(row.ids) >= row.limit:
            row.finish = "eos" if token in policy.eos else "length"
    return tokens


@torch.no_grad()
def decode(policy: common.Policy, rows: Iterable[Row], *, slots: int, max_tokens: int = 0,
           temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Iterator[list[Row]]:
    """Draw all rows, at most `slots` of them at a time; yields lists of those that finish together.
    rows are taken one by one as slots become free, so an iterator may decide late what comes next.

    max_tokens: most in the KV cache, slots times columns; 0 is no bound. Nothing is reserved for a
    row's future: when all columns together outgrow it, the youngest rows are put back, and later
    prefilled again with what they have; a prompt and its limit must fit on their own.
    """
    batch, queue = Batch(policy.model, slots, max_tokens), Queue(rows)
    how = temperature, top_k, top_p
    while (fresh := batch.admit(queue)) or batch.rows:
        # === rows join, with their first token ===
        for some, logits, prefilled, source in prefill(policy.model, fresh):
            batch.add(some, prefilled, source)
            state = torch.tensor([[row.key, len(row.ids)] for row in some], device=logits.device)
            extend(policy, some, logits, *state.T, how)
            del logits, prefilled  # or they would stay in memory until the next rows join
            if done := batch.remove_finished():
                yield done

        # === one step: the last token of every row goes in, the next one is drawn ===
        if batch.rows:
            batch.make_room(queue)
            logits = batch.forward()
            batch.last = extend(policy, batch.rows, logits, batch.keys, batch.drawn, how)
            if done := batch.remove_finished():
                yield done


def sample(policy: common.Policy, prompts: list[Tensor], keys: list[list[int]], limits: list[int],
           *, slots: int = 0, **more) -> list[list[Row]]:
    """Responses to P prompts, as rows that are done: one per key of keys[p] to prompts[p], of at
    most limits[p] tokens. slots (0 for all), more: as in `decode`."""
    rows = [[Row(p, key, n) for key in ks] for p, ks, n in zip(prompts, keys, limits, strict=True)]
    every = [row for of_prompt in rows for row in of_prompt]
    for _ in decode(policy, every, slots=slots or len(every), **more):
        pass
    return rows


# --- flags ----------------------------------------------------------------------------------------
def add_sampling_args(parser: argparse.ArgumentParser, max_new_tokens: int = 8192) -> None:
    """Flags of every stage that samples."""
    add = parser.add_argument_group("sampling").add_argument
    add("--max-new-tokens", type=POSITIVE, default=max_new_tokens,
        help="[Table 7] longest response, in tokens: 8,192 in training, 32,000 in evaluation")
    add("--temperature", type=checked(float, lambda t: t >= 0), default=1.0, help="0 is greedy")
    add("--top-p", type=checked(float, lambda p: 0 < p <= 1), default=1.0, help="1 is off")
    add("--top-k", type=COUNT, default=0, help="0 is off")
    add("--seed", type=int, default=0, help="all random numbers are functions of it")
    add("--limit", type=COUNT, default=0, help="only the first so many problems; 0 for all")
    add("--decode-rows", type=POSITIVE, default=64, help="most sequences decoded together")
    add("--decode-tokens", type=COUNT, default=2**18,
        help="most tokens in the KV cache, prompts and responses: the memory flag; 0 is no bound")


def settings(args: argparse.Namespace) -> dict:
    """What these flags say to `sample` and `decode`."""
    return {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p,
            "slots": args.decode_rows, "max_tokens": args.decode_tokens}
