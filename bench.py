"""Speed and memory, each measured against a reference in the same run: one JSON line per measure.

    python bench.py revise            one Frank-Wolfe step against Algorithm 1 written literally
    python bench.py revise --device cuda    the same in the shape of Qwen2.5-1.5B, and by batch size and length
    python bench.py rollout           sampling against Transformers' generate(); --device cuda: in the shape of Qwen2.5-1.5B

Fields: `measure`, `ours`, `reference`, `ratio` = reference / ours (above 1: ours is better), `unit`, `shape`;
`ratio_to_frozen` is the same for a reference whose parameters ask for no gradient. Timings are
medians of interleaved runs. `revise_saved_bytes_*` is the most that autograd keeps alive at a time, parameters excluded.
`rollout_*` are seconds per 1,000 response tokens. `row_steps` are the rows of all decoding steps, `ideal` those that some
response needed; `host_*_per_step` are the operations dispatched, and the time spent, outside of the model's forward pass.
"""
import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config

import common
import packed
import revise
import sampling

SHAPES = {"short": (150, 800, 200, 20), "long": (150, 3200, 800, 20)}  # tokens: q, r, c, template and gold together

PROMPT = 64  # tokens, of the sampling measures


def random_qwen2(args: argparse.Namespace, device: torch.device):
    """Random weights. On a CPU a small model in which the head holds about 15 % of the multiplications, as it does in
    Qwen2.5-1.5B; on a GPU the shape of Qwen2.5-1.5B itself."""
    torch.manual_seed(0)
    shape = {"vocab_size": 6144, "hidden_size": 256, "intermediate_size": 1472, "num_hidden_layers": 6, "num_attention_heads": 4}
    if device.type == "cuda":
        shape = {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                 "num_attention_heads": 12}
    config = Qwen2Config(**shape, num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True)
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def random_failure(shape: tuple[int, int, int, int], vocab: int, seed: int = 1) -> tuple[revise.Failure, list[int]]:
    """A failed rollout of so many tokens (q, r, c, template and gold together, 4 of them gold), and the template."""
    q, r, c, a = shape
    ids = torch.randint(0, vocab, (q + r + c + a,), generator=torch.Generator().manual_seed(seed)).tolist()
    return revise.Failure("bench", 0, ids[:q], ids[q:q + r], ids[q + r:q + r + c], ids[-4:]), ids[-a:-4]


def literal_step(model, f: revise.Failure, template: list[int], W: torch.Tensor, E: torch.Tensor, weights: tuple) -> tuple:
    """Losses, gradient and vertices as Algorithm 1 reads: a teacher-forced pass with full logits for each loss, backward(),
    then one product with the whole vocabulary. Parameters that nobody froze get gradients too."""
    embed = model.get_input_embeddings()
    E = E.detach().requires_grad_()

    def logp(*parts: list[int]) -> torch.Tensor:
        """sum log p of the last part's tokens, given q, E and the parts before it."""
        ids = torch.tensor([i for p in parts for i in p], device=E.device)
        x = torch.cat([embed(torch.tensor(f.q, device=E.device)), E.to(W.dtype), embed(ids)])[None]
        logits = model(inputs_embeds=x, use_cache=False).logits[0].float()
        n = len(parts[-1])
        return -F.cross_entropy(logits[-n - 1:-1], ids[-n:], reduction="sum")

    explore, guide = logp(f.c), -logp(template, f.gold)
    x = torch.cat([embed(torch.tensor(f.q, device=E.device)), E.to(W.dtype)])[None]
    logits = model(inputs_embeds=x, use_cache=False).logits[0].float()
    nll = F.cross_entropy(logits[len(f.q) - 1:-1], torch.tensor(f.r, device=E.device), reduction="sum")
    (weights[0] * explore + weights[1] * guide + weights[2] * nll).backward()
    model.zero_grad(set_to_none=True)
    return torch.stack([explore, guide, nll]).detach(), E.grad, (E.grad.float() @ W.float().T).argmin(-1)


def literal_frozen_step(model, *step) -> tuple:
    """The literal step for a model that somebody froze: what packing alone is worth."""
    model.requires_grad_(False)
    try:
        return literal_step(model, *step)
    finally:
        model.requires_grad_(True)


def packed_step(model, f: revise.Failure, template: list[int], W: torch.Tensor, E: torch.Tensor, weights: tuple) -> tuple:
    losses, G, v = packed_steps(model, [f], template, W, E, weights)
    return losses[0], G, v


def packed_steps(model, batch: list[revise.Failure], template: list[int], W: torch.Tensor, E: torch.Tensor, weights: tuple,
                 checkpoint: bool = False) -> tuple:
    """One Frank-Wolfe step of several rollouts as revise.py does it."""
    with packed.frozen(model, checkpoint):
        tensors = packed.pack(batch, template, weights, False, W.device)
        losses, G = packed.losses_and_gradient(model, tensors, E)
    return losses, G, revise.oracle(G, W, torch.arange(len(W), device=W.device))


def clock() -> float:
    """Seconds. Those of this process alone where a CPU is used with one thread: others on the machine do not count."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() if torch.cuda.is_available() or torch.get_num_threads() > 1 else time.process_time()


def timed(function, *args) -> float:
    start = clock()
    function(*args)
    return clock() - start


def saved_bytes(model, function, *args) -> int:
    """Largest number of bytes that autograd keeps alive for a backward at any time: distinct storages, without the model's."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    users, live, peak = {}, 0, 0

    class Saved:  # autograd holds it for as long as it needs the tensor
        def __init__(self, t: torch.Tensor):
            nonlocal live, peak
            self.t, self.key, self.size = t, t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
            if self.key not in own:
                live += 0 if users.get(self.key) else self.size
                users[self.key] = users.get(self.key, 0) + 1
                peak = max(peak, live)

        def __del__(self):
            nonlocal live
            if self.key not in own:
                users[self.key] -= 1
                live -= 0 if users[self.key] else self.size

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.t):
        function(*args)
    return peak


def report(measure: str, ours: float, reference: float, unit: str, **facts) -> None:
    print(json.dumps({"measure": measure, "ours": ours, "reference": reference, "ratio": round(reference / ours, 3),
                      "unit": unit, **facts}), flush=True)


def bench_revise(args: argparse.Namespace) -> None:
    device = common.pick_device(args)
    model = random_qwen2(args, device)
    W = model.get_input_embeddings().weight.detach()
    weights = (1.0, 1.0, 0.1)
    for name, shape in SHAPES.items():
        f, template = random_failure(shape, len(W))
        step = (model, f, template, W, revise.soft_prefix(W, f.atoms, f.weights), weights)
        (ours, G, v), (theirs, G_literal, v_literal) = packed_step(*step), literal_step(*step)
        agreement = {"gradient_relative_error": float((G - G_literal).norm() / G_literal.norm()),
                     "vertices_equal": float((v == v_literal).float().mean()),
                     "losses_relative_error": float(((ours - theirs) / theirs).abs().max())}
        runs = [[timed(s, *step) for s in (packed_step, literal_step, literal_frozen_step)] for _ in range(args.runs)]
        fast, slow, frozen = (statistics.median(x) for x in zip(*runs))
        report(f"revise_step_{name}", fast, slow, "seconds", shape=shape, threads=torch.get_num_threads(),
               ratio_to_frozen=round(frozen / fast, 3), **agreement)
        ours, theirs, frozen = (saved_bytes(model, s, *step) for s in (packed_step, literal_step, literal_frozen_step))
        report(f"revise_saved_bytes_{name}", ours, theirs, "bytes", shape=shape, ratio_to_frozen=round(frozen / ours, 3))
    if device.type == "cuda":
        bench_revise_cuda(model, W, weights, args)


def bench_revise_cuda(model, W: torch.Tensor, weights: tuple, args: argparse.Namespace) -> None:
    """Seconds per rollout-step and peak memory by batch size and length. Reference: the floor of operations at 790 TFLOP/s
    (7.5 + 0.37 TFLOP for the short shape), a computed figure."""
    floor = 9.9e-3
    for name, shape, batch, checkpoint in [*(("1k", SHAPES["short"], n, False) for n in (1, 2, 4, 8, 16)),
                                           ("8k", (150, 6400, 1600, 20), 1, False), ("8k", (150, 6400, 1600, 20), 1, True)]:
        failures = [random_failure(shape, len(W), seed)[0] for seed in range(batch)]
        E = torch.cat([revise.soft_prefix(W, f.atoms, f.weights) for f in failures])
        step = (model, failures, random_failure(shape, len(W))[1], W, E, weights, checkpoint)
        packed_steps(*step)
        torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(timed(packed_steps, *step) for _ in range(args.runs)) / batch  # denominator: rollouts
        print(json.dumps({"measure": f"revise_step_{name}_batch{batch}" + "_checkpointed" * checkpoint, "ours": seconds,
                          "unit": "seconds per rollout-step", "peak_bytes": torch.cuda.max_memory_allocated(),
                          **({"floor": floor, "share_of_floor": round(floor / seconds, 3)} if name == "1k" else {})}), flush=True)


class Outside(TorchDispatchMode):
    """Counts operations and time outside of a model's forward pass, and the rows and number of its decoding steps."""

    def __init__(self, model):
        super().__init__()
        self.inside, self.operations, self.forward_seconds, self.steps, self.rows = False, 0, 0.0, 0, 0
        self.hooks = [model.register_forward_pre_hook(self.enter, with_kwargs=True), model.register_forward_hook(self.leave)]

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
    """Decoding steps, their rows, and what is done outside of the forward pass, per step; the GPU's work is waited for there."""
    counted = Outside(model)
    with counted:
        function()
    for hook in counted.hooks:
        hook.remove()
    clocked = Outside(model)  # without its dispatch mode, which costs time itself
    seconds = timed(function)
    for hook in clocked.hooks:
        hook.remove()
    return {"row_steps": counted.rows, "steps": counted.steps, "host_ops_per_step": round(counted.operations / counted.steps, 1),
            "host_ms_per_step": round(1000 * (seconds - clocked.forward_seconds) / clocked.steps, 3)}


def bench_sampling(model, measure: str, args: argparse.Namespace, *, prompts: int, n: int, limit: int, eos: int, slots: int = 0,
                   **facts) -> None:
    """Seconds per 1,000 response tokens of `sample` and of generate(), which takes `slots` rows at a time (0: all of them).

    eos: that many ids end a response, so that lengths are geometric with a mean of vocabulary / eos tokens (0: none does).
    """
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(eos, vocab, (prompts, PROMPT), generator=generator).to(model.device)
    stops, slots = list(range(eos)), slots or prompts * n
    model.generation_config.eos_token_id = stops or None

    def ours(seed: int) -> list[int]:
        keys = [[sampling.row_key(seed, p, s) for s in range(n)] for p in range(prompts)]
        found = sampling.sample(model, list(ids), keys, [limit] * prompts, eos=stops, vocab=vocab, slots=slots)
        return [len(s.ids) for of_prompt in found for s in of_prompt]

    def theirs(seed: int) -> list[int]:
        torch.manual_seed(seed)
        lengths = []
        for batch in ids.split(slots // n):
            out = model.generate(batch, attention_mask=torch.ones_like(batch), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                 num_return_sequences=n, max_new_tokens=limit, pad_token_id=0)[:, PROMPT:]
            ended = out < eos
            lengths += torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1]).tolist()
        return lengths

    ours(0), theirs(0)
    runs = {ours: [], theirs: []}
    for seed in range(1, args.runs + 1):
        for sampler, seconds in runs.items():
            lengths = []
            seconds.append(1000 * timed(lambda f, seed, out: out.extend(f(seed)), sampler, seed, lengths) / sum(lengths))  # tokens
    fast, slow = (statistics.median(x) for x in runs.values())
    ideal = sum(length - 1 for length in ours(1))  # the first token of a response comes from the pass over its prompt
    counts = outside_forward(model, lambda: ours(1))
    report(f"rollout_{measure}", fast, slow, "seconds per 1,000 tokens", prompts=prompts, samples=n, slots=slots, limit=limit,
           vocabulary=vocab, threads=torch.get_num_threads(), ideal=ideal, row_steps_to_ideal=round(counts["row_steps"] / ideal, 3),
           **counts, **facts)


def narrow_qwen2(vocab: int, args: argparse.Namespace, device: torch.device):
    """Random weights, 4 layers of width 128: small beside its vocabulary."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=vocab, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True)
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").to(device)


def bench_rollout(args: argparse.Namespace) -> None:
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
    """By batch size. byte_floor: seconds per 1,000 tokens when a step reads all weights and the mean cache once, as fast as the
    device copies."""
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
        bench_sampling(model, f"cuda_{rows}", args, prompts=rows // 8, n=8, limit=limit, eos=0,
                       byte_floor=1000 * floor / rows, bandwidth=bandwidth)  # a step makes a token per row


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["revise", "rollout"], help="[ours] what to measure")
    parser.add_argument("--device", default="auto", help="[ours] auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="[ours] as elsewhere")
    parser.add_argument("--runs", type=int, default=5, help="[ours] interleaved runs of each; the median is reported")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    {"revise": bench_revise, "rollout": bench_rollout}[args.what](args)


if __name__ == "__main__":
    common.run_script(get_args, main)
