"""Draw responses from a model: a queue of rows, a batch that stays full, and random numbers that belong to a row alone.

`sample` is the one sampling function of the project; `decode` is what it and rollout.py run. A row's random numbers
depend on its key and nothing else (see `uniforms`), and in float32 its text neither on the batch it is in, its
neighbours, when it joined, the number of processes nor a restart, up to rounding: logits of another batch shape differ
in their last digits, and a uniform that lies on a boundary of the CDF falls on its other side. Seen: two tokens in ten
million with toy/sums_model, 64 slots against 7; the row differs from there on. The same shapes give the same bits.
Sampling settings are the arguments alone, never those of a checkpoint's generation_config.

How the batch works. All live rows write their next key and value into the same column of one buffer per layer, so a row
occupies the columns start .. end-1 and everything before its start is masked; with explicit positions it does not
matter where it starts. A prompt is prefilled once, for all of its responses that join together, and its keys are copied
to the columns that end where the batch is. A finished row's slot is taken by the last row at once: no step is spent on
a row that is done. Columns left of every start are out of sight, and dropped when the buffers grow.
"""
import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from helpers import common
from helpers.common import UserError

# Dimension key: P prompts, B rows of the batch, C columns of the KV cache, T tokens of a prompt,
# V vocabulary, D model width

PREFILL_TOKENS = 8192  # prefilled in one pass, padding included; a longer prompt is a pass of its own
BLOCK = 256  # of the vocabulary, in `draw`


# --- random numbers and the draw --------------------------------------------------------------------------------------
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


def uniforms(keys: Tensor, position: int | Tensor) -> Tensor:
    """One float32 uniform in [0, 1) per row, (B,): a hash of (row key, position), so no generator has a state to lose.

    position: that of the token in its response, one for all rows or (B,). splitmix64 (Steele et al. 2014) in wrapping
    int64 arithmetic; `& mask` makes the right shifts logical.
    """
    x = keys + (torch.as_tensor(position) + 1) * (0x9E3779B97F4A7C15 - 2**64)
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
    logits = filter_logits(logits if temperature == 1 else logits / temperature, top_k, top_p)
    B, V = logits.shape
    weights = logits.new_empty(B, -(-V // BLOCK) * BLOCK)  # unnormalised probabilities, in whole blocks
    weights[:, V:] = 0
    torch.sub(logits, logits.amax(-1, keepdim=True), out=weights[:, :V])
    weights[:, :V].exp_()
    # The CDF at the end of every block, then inside the one block that u falls into: sums in float64 that a GPU's
    # parallel scan cannot leave out of order, and a fraction of the time of one scan over V
    weights = weights.view(B, -1, BLOCK)
    sums = weights.sum(-1).double()  # (B, blocks)
    cdf = sums.cumsum(-1)
    total = cdf[:, -1:]
    target = u[:, None] * total
    # right=True: the first entry beyond the target, so that nothing of probability 0 is drawn, not even at u = 0
    block = torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[1] - 1)  # (B, 1); beyond it only for nan
    inside = weights[torch.arange(B, device=u.device), block[:, 0]]  # (B, BLOCK)
    cdf_inside = inside.double().cumsum(-1)
    rest = (target - cdf.gather(1, block) + sums.gather(1, block)).clamp(min=0)
    rest = torch.minimum(rest, cdf_inside[:, -1:] * (1 - 2**-40))  # sums is rounded: not beyond the block's last weight
    token = torch.searchsorted(cdf_inside, rest, right=True).clamp_(max=BLOCK - 1)
    logprob = (inside.gather(1, token) / total).log().float()
    return (block * BLOCK + token)[:, 0], logprob[:, 0]


# --- the batch and its KV cache ---------------------------------------------------------------------------------------
@dataclass(eq=False)
class Row:
    """A response to draw and what is drawn of it so far. prompt: token ids (T,) or input embeddings (T, D), T >= 1."""
    prompt: Tensor
    key: int
    limit: int  # tokens
    tag: object = None  # whatever the caller wants to know it by
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""  # "eos" or "length" once it is done
    start: int = 0  # its first column while it is in the batch

    def __len__(self) -> int:
        return len(self.prompt) + len(self.ids)


class SlotLayer(DynamicLayer):
    """A layer of the cache, written in place: Transformers' own concatenates, which copies the whole cache at every
    step and is most of the time of a small model. buffers: keys and values, each (slots, heads, room, head_dim)."""

    def __init__(self, batch: "Batch"):
        super().__init__()
        self.batch, self.buffers = batch, []

    def get_seq_length(self) -> int:
        return self.batch.end - self.batch.low

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        n, low, end = len(self.batch.rows), self.batch.low, self.batch.end
        for buffer, new in zip(self.buffers, (key_states, value_states)):
            buffer[:n, :, end:end + 1] = new
        keys, values = (buffer[:n, :, low:end + 1] for buffer in self.buffers)
        return keys, values


def new_cache(config) -> DynamicCache:
    """An empty KV cache that keeps every key: where attention slides, the model's own mask hides those out of sight.
    Raises UserError naming --model where a layer has another kind of state."""
    cache = DynamicCache(config=config)
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UserError(f"--model: a layer without a KV cache ({type(layer).__name__}) is not supported")
    cache.layers = [DynamicLayer() for _ in cache.layers]
    return cache


class Batch:
    """The live rows and their keys and values: row i has the columns rows[i].start .. end-1 of slot i."""

    def __init__(self, config, slots: int, max_tokens: int):
        self.slots, self.max_tokens = slots, max_tokens
        self.rows: list[Row] = []
        self.low = self.end = 0  # columns low .. end-1 are in use, `end` is written next
        self.size = self.room = 0  # slots and columns of the buffers
        self.cache = new_cache(config)
        self.cache.layers = [SlotLayer(self) for _ in self.cache.layers]

    def fits(self, rows: int, columns: int) -> bool:
        """Whether max_tokens allows so many rows of so many columns, with an eighth to grow (else a row that joins now
        would be put back at the next step). One row always fits: its caller has seen to it that it can end."""
        return rows <= self.slots and (
            not self.max_tokens or rows == 1 or rows * (columns + columns // 8 + 1) <= self.max_tokens)

    def resize(self, rows: int, columns: int, refill: bool) -> None:
        """New buffers for at least so many rows and columns and one more, with room to grow; what is out of sight is
        dropped. refill: whether more rows may come."""
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

    def add(self, rows: list[Row], lengths: list[int], prefilled: DynamicCache, source: Tensor) -> None:
        """Put rows into free slots. Row i has the last lengths[i] columns of row source[i] of a prefilled cache."""
        n, k = len(self.rows), len(rows)
        for layer, new in zip(self.cache.layers, prefilled.layers):
            states = new.keys, new.values  # (P, heads, T, head_dim), left-padded
            layer.buffers = layer.buffers or [x.new_zeros(self.size, x.shape[1], self.room, x.shape[3]) for x in states]
            for buffer, x in zip(layer.buffers, states):
                buffer[n:n + k, :, self.end - x.shape[2]:self.end] = x[source]
        for row, length in zip(rows, lengths):
            row.start = self.end - length
        self.rows += rows
        self.low = min(row.start for row in self.rows)

    def remove(self, gone: list[int]) -> None:
        """Free the slots of some rows; the last rows move into them."""
        keep = len(self.rows) - len(gone)
        holes = [i for i in gone if i < keep]
        movers = [i for i in range(keep, len(self.rows)) if i not in gone]
        if holes:
            for layer in self.cache.layers:
                for buffer in layer.buffers:
                    buffer[holes, :, self.low:self.end] = buffer[movers, :, self.low:self.end]
        for hole, mover in zip(holes, movers):
            self.rows[hole] = self.rows[mover]
        del self.rows[keep:]
        self.low = min((row.start for row in self.rows), default=self.end)


# --- sampling ---------------------------------------------------------------------------------------------------------
def prefill(model, rows: list[Row]) -> Iterator[tuple[list[Row], Tensor, DynamicCache, Tensor]]:
    """In passes of at most PREFILL_TOKENS: some of the rows, the logits (B, V) of their next token, the cache of their
    P distinct contexts, and which of these is whose, (B,). Rows that share a prompt tensor share its pass."""
    device, embed = model.device, model.get_input_embeddings()
    groups = {}
    for row in rows:
        groups.setdefault(id(row) if row.ids else id(row.prompt), []).append(row)
    groups = list(groups.values())
    for indices in common.batches_by_length([len(g[0]) for g in groups], PREFILL_TOKENS):
        firsts = [groups[i][0] for i in indices]
        width = max(map(len, firsts))
        x = torch.zeros(len(firsts), width, embed.embedding_dim, dtype=embed.weight.dtype, device=device)  # (P, T, D)
        mask = torch.zeros(len(firsts), width, dtype=torch.long, device=device)  # (P, T), left-padded
        for i, row in enumerate(firsts):
            prompt = row.prompt.to(device)
            drawn = embed(torch.tensor(row.ids, dtype=torch.long, device=device))
            x[i, width - len(row):] = torch.cat([prompt if prompt.is_floating_point() else embed(prompt), drawn])
            mask[i, width - len(row):] = 1
        # explicit positions: with left padding the model's own arange would be silently wrong
        out = model(inputs_embeds=x, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                    past_key_values=new_cache(model.config), use_cache=True, logits_to_keep=1)
        source = torch.tensor([p for p, i in enumerate(indices) for _ in groups[i]], device=device)
        yield [row for i in indices for row in groups[i]], out.logits[source, -1], out.past_key_values, source


@torch.no_grad()
def decode(policy: common.Policy, rows: Iterable[Row], *, slots: int, max_tokens: int = 0, temperature: float = 1.0,
           top_k: int = 0, top_p: float = 1.0) -> Iterator[list[Row]]:
    """Draw all rows, at most `slots` of them at a time; yields lists of finished ones, in the order they finish.

    rows are taken one by one as slots become free, so an iterator may decide late what comes next. Ids at or beyond
    the policy's vocab are never produced. max_tokens: the KV cache never holds more than so many (slots times
    columns; 0 is no bound). Nothing is reserved for a row's future: when the columns of all have grown beyond the
    bound, the youngest rows are put back, and later prefilled again with what they have; a prompt and its limit must
    fit on their own.
    """
    model, vocab, stops = policy.model, policy.vocab, set(policy.eos)
    device = model.device
    batch = Batch(model.config, slots, max_tokens)
    windowed = any(layer.is_sliding for layer in DynamicCache(config=model.config).layers)
    rows, waiting, dry, changed = iter(rows), deque(), False, True

    def joining() -> list[Row]:
        """The next rows, when as many as an eighth of the batch fit in:
        a prefill each would cost more than free slots."""
        nonlocal dry
        n, columns, fresh = len(batch.rows), batch.end - batch.low, []
        while batch.fits(n + len(fresh) + (1 if fresh else max(1, n // 8)), columns):
            row = waiting.popleft() if waiting else next(rows, None)
            if row is None:
                dry = True
                break
            if not batch.fits(n + len(fresh) + 1, max(columns, len(row))):
                waiting.appendleft(row)
                break
            fresh.append(row)
            columns = max(columns, len(row))
        return fresh

    def advance(rows: list[Row], logits: Tensor, keys: Tensor, drawn: Tensor) -> tuple[Tensor, list[int]]:
        """Draw the next token of rows that have `drawn` so far; returns the tokens (B,) and which rows are done."""
        token, logprob = draw(logits[:, :vocab], uniforms(keys, drawn), temperature, top_k, top_p)
        done = []
        for i, (row, t, p) in enumerate(zip(rows, token.tolist(), logprob.tolist())):
            if math.isnan(p):  # of damaged weights, or of an overflow
                raise UserError("--model: its logits are not numbers")
            row.ids.append(t)
            row.logprobs.append(p)
            if t in stops or len(row.ids) >= row.limit:
                row.finish = "eos" if t in stops else "length"
                done.append(i)
        return token, done

    while True:
        # === rows join ===
        fresh = joining()
        if fresh:
            changed = True
            columns = max(batch.end - batch.low, *map(len, fresh))
            if len(batch.rows) + len(fresh) > batch.size or columns > batch.end:
                batch.resize(len(batch.rows) + len(fresh), columns, refill=not dry)
            for some, logits, prefilled, source in prefill(model, fresh):
                lengths = [len(row) for row in some]  # before they get their first token
                keys, drawn = torch.tensor([[row.key, len(row.ids)] for row in some], device=device).T
                _, done = advance(some, logits, keys, drawn)
                live = [i for i in range(len(some)) if i not in done]
                if live:
                    batch.add([some[i] for i in live], [lengths[i] for i in live], prefilled, source[live])
                if done:
                    yield [some[i] for i in done]
            del logits, prefilled
        if not batch.rows:
            if not fresh:
                return
            continue

        # === room for one more column ===
        if batch.end == batch.room:
            while not batch.fits(len(batch.rows), batch.end - batch.low):
                youngest = max(range(len(batch.rows)), key=lambda i: batch.rows[i].start)
                waiting.appendleft(batch.rows[youngest])
                batch.remove([youngest])
            batch.resize(len(batch.rows), batch.end - batch.low, refill=bool(waiting) or not dry)
            changed = True

        # === one step: the last token of every row goes in, the next one is drawn ===
        if changed:
            keys, drawn, position, start, token = torch.tensor(
                [[r.key, len(r.ids), len(r) - 1, r.start, r.ids[-1]] for r in batch.rows], device=device).T  # (B,) each
            columns = torch.arange(batch.room, device=device)
        mask = columns[batch.low:batch.end + 1] >= start[:, None]  # (B, C)
        # with four dimensions the model takes the mask as it is; only its own knows of a sliding window
        logits = model(input_ids=token[:, None], attention_mask=mask if windowed else mask[:, None, None],
                       position_ids=position[:, None], past_key_values=batch.cache, use_cache=True).logits[:, -1]
        batch.end += 1
        token, done = advance(batch.rows, logits, keys, drawn)
        drawn, position, changed = drawn + 1, position + 1, bool(done)
        if done:
            finished = [batch.rows[i] for i in done]
            batch.remove(done)
            yield finished


def sample(policy: common.Policy, prompts: list[Tensor], keys: list[list[int]], limits: list[int], *,
           temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, slots: int = 0,
           max_tokens: int = 0) -> list[list[Sample]]:
    """Responses to P prompts, len(keys[p]) of them to prompt p, at most limits[p] tokens each, in the order of keys.

    prompts: each (T,) token ids or (T, D) input embeddings, T >= 1. keys: one row key per response (`row_key`).
    slots: how many are decoded together, 0 for all; the other arguments are those of `decode`.
    """
    rows = [[Row(p, key, limit) for key in ks] for p, ks, limit in zip(prompts, keys, limits)]
    queue = [row for of_prompt in rows for row in of_prompt]
    for _ in decode(policy, queue, slots=slots or len(queue), max_tokens=max_tokens, temperature=temperature,
                    top_k=top_k, top_p=top_p):
        pass
    return [[Sample(row.ids, row.logprobs, row.finish) for row in of_prompt] for of_prompt in rows]
