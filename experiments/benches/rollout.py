"""Sampling against Transformers' generate()."""
import argparse
import statistics

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config

from experiments.benches.tools import clock, random_qwen2, report, timed
from helpers import common, sampling
from helpers.common import Policy

PROMPT = 64  # tokens


class Outside(TorchDispatchMode):
    """Counts operations and time outside of a model's forward pass, and the rows and number of its decoding steps."""

    def __init__(self, model):
        super().__init__()
        self.inside, self.operations, self.forward_seconds, self.steps, self.rows = False, 0, 0.0, 0, 0
        self.hooks = [model.register_forward_pre_hook(self.enter, with_kwargs=True),
                      model.register_forward_hook(self.leave)]

    def enter(self, model, args, kwargs) -> None:
        self.inside, self.start = True, clock()
        ids = kwargs.get("input_ids")
        if ids is not None and ids.shape[1] == 1:
            self.steps, self.rows = self.steps + 1, self.rows + len(ids)

    def leave(self, *_) -> None:
        self.inside = False
        self.forward_seconds += clock() - self.start

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += not self.inside
        return function(*args, **(kwargs or {}))


def outside_forward(model, function) -> dict[str, float]:
    """Decoding steps, their rows, and what is done outside of the forward pass, per step;
    the GPU's work is waited for there."""
    counted = Outside(model)
    with counted:
        function()
    for hook in counted.hooks:
        hook.remove()
    clocked = Outside(model)  # without its dispatch mode, which costs time itself
    seconds = timed(function)
    for hook in clocked.hooks:
        hook.remove()
    return {"row_steps": counted.rows, "steps": counted.steps,
            "host_ops_per_step": round(counted.operations / counted.steps, 1),
            "host_ms_per_step": round(1000 * (seconds - clocked.forward_seconds) / clocked.steps, 3)}


def compare(policy: Policy, prompts: list[torch.Tensor], n: int, limit: int, slots: int, seeds: range) -> tuple:
    """Seconds per 1,000 response tokens of n responses to every prompt by `sample` and by generate(), which takes
    `slots` rows at a time: medians of interleaved runs; and the former as a function of the seed, to its lengths."""
    model, stops = policy.model, torch.tensor(policy.eos)
    model.generation_config.eos_token_id = policy.eos or None
    T = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), T, dtype=torch.long)  # left-padded
    for row, seen, prompt in zip(ids, mask, prompts):
        row[T - len(prompt):], seen[T - len(prompt):] = prompt, 1
    ids, mask = ids.to(model.device), mask.to(model.device)

    def ours(seed: int) -> list[int]:
        keys = [[sampling.row_key(seed, p, s) for s in range(n)] for p in range(len(prompts))]
        found = sampling.sample(policy, prompts, keys, [limit] * len(prompts), slots=slots)
        return [len(s.ids) for of_prompt in found for s in of_prompt]

    def theirs(seed: int) -> list[int]:
        torch.manual_seed(seed)
        lengths = []
        for batch, seen in zip(ids.split(slots // n), mask.split(slots // n)):
            out = model.generate(
                batch, attention_mask=seen, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                repetition_penalty=1.0, num_return_sequences=n, max_new_tokens=limit, pad_token_id=0)[:, T:]
            ended = torch.isin(out, stops.to(out.device))
            lengths += torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1]).tolist()
        return lengths

    runs = {ours: [], theirs: []}
    for seed in seeds:
        for sampler, seconds in runs.items():
            lengths = []
            spent = timed(lambda f, seed, out: out.extend(f(seed)), sampler, seed, lengths)
            seconds.append(1000 * spent / sum(lengths))  # tokens
    return *(statistics.median(x) for x in runs.values()), ours


def bench_sampling(model, measure: str, args: argparse.Namespace, *, prompts: int, n: int, limit: int, eos: int,
                   slots: int = 0, **facts) -> None:
    """Random prompts. eos: that many ids end a response, so that lengths are geometric with a mean of vocabulary / eos
    tokens (0: none does). slots: 0 for all rows."""
    vocab, slots = model.config.vocab_size, slots or prompts * n
    generator = torch.Generator().manual_seed(2)
    ids = list(torch.randint(eos, vocab, (prompts, PROMPT), generator=generator).to(model.device))
    policy = Policy(model, None, vocab, list(range(eos)))
    compare(policy, ids, n, limit, slots, range(1))  # for a start
    fast, slow, ours = compare(policy, ids, n, limit, slots, range(1, args.runs + 1))
    ideal = sum(length - 1 for length in ours(1))  # the first token of a response comes from the pass over its prompt
    counts = outside_forward(model, lambda: ours(1))
    report(f"rollout_{measure}", fast, slow, "seconds per 1,000 tokens", prompts=prompts, samples=n, slots=slots,
           limit=limit, vocabulary=vocab, threads=torch.get_num_threads(), ideal=ideal,
           row_steps_to_ideal=round(counts["row_steps"] / ideal, 3), **counts, **facts)


def narrow_qwen2(vocab: int, args: argparse.Namespace, device: torch.device):
    """Random weights, 4 layers of width 128: small beside its vocabulary."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=vocab, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
                         tie_word_embeddings=True)
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").to(device)


def main(args: argparse.Namespace) -> None:
    device = common.pick_device(args)
    if device.type == "cuda":
        bench_rollout_cuda(random_qwen2(args, device).eval(), args)
        return
    model = narrow_qwen2(4096, args, device).eval()
    bench_sampling(model, "v4k", args, prompts=4, n=8, limit=64, eos=0)
    bench_sampling(model, "skewed", args, prompts=4, n=8, limit=256, eos=4096 // 48)
    bench_sampling(model, "queue", args, prompts=32, n=8, limit=256, eos=4096 // 48, slots=32)
    bench_sampling(narrow_qwen2(151936, args, device).eval(), "v152k", args, prompts=4, n=8, limit=24, eos=0)


def bench_rollout_cuda(model, args: argparse.Namespace, limit: int = 512) -> None:
    """By batch size. byte_floor: seconds per 1,000 tokens when a step reads all weights and the mean cache once,
    as fast as the device copies."""
    source, target = (torch.empty(2**30, dtype=torch.uint8, device=model.device) for _ in range(2))
    timed(target.copy_, source)
    # every byte is read and written
    bandwidth = 2 * len(source) / statistics.median(timed(target.copy_, source) for _ in range(args.runs))
    config, width = model.config, model.dtype.itemsize
    weights = width * sum(p.numel() for p in model.parameters())  # the tied head counts, and is read, once
    head_dim = config.hidden_size // config.num_attention_heads
    per_token = width * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim  # bytes of keys and values
    for rows in (8, 64, 256):
        floor = (weights + rows * (PROMPT + limit // 2) * per_token) / bandwidth  # seconds a step
        # a step makes a token per row
        bench_sampling(model, f"cuda_{rows}", args, prompts=rows // 8, n=8, limit=limit, eos=0,
                       byte_floor=1000 * floor / rows, bandwidth=bandwidth)
