"""Speed and memory, each measured against a reference in the same run: one JSON line per measure.

    python bench.py revise            one Frank-Wolfe step against Algorithm 1 written literally
    python bench.py revise --device cuda    the same in the shape of Qwen2.5-1.5B, and by batch size and length
    python bench.py grpo              one update of train_grpo.py against TRL's GRPOTrainer (requirements-bench.txt) and against
                                      full logits of rows padded to the longest (CPU)
    python bench.py memory            the formula of the README against what toy_model keeps (CPU), and its figures for the paper's

Fields: `measure`, `ours`, `reference`, `ratio` = reference / ours (above 1: ours is better), `unit`, `shape`;
`ratio_to_frozen` is the same for a reference whose parameters ask for no gradient. Timings are
medians of interleaved runs. `revise_saved_bytes_*` is the most that autograd keeps alive at a time, parameters excluded.
`grpo_peak_memory_*` is the largest resident set of a process that does nothing else; `*_beyond_start` leaves out what it held
before its first update (libraries, weights), so that it is gradients, moments and activations.
"""
import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

import common
import packed
import revise
import train_grpo
import training
from common import UserError

SHAPES = {"short": (150, 800, 200, 20), "long": (150, 3200, 800, 20)}  # tokens: q, r, c, template and gold together


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


def timed(function, *args) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


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


# --- one update of GRPO ----------------------------------------------------------------------------------------------
GROUPS, GROUP, ROWS = 1, 8, 4  # prompts, responses to each, rows of a micro-batch of the references
VOCAB = 151936


def grpo_rows() -> list[dict]:
    """Rollouts with lengths as a sampler leaves them: log-normal, median 150, few of them several times as long."""
    rng = random.Random(0)
    rows = []
    for _ in range(GROUPS):
        prompt = [rng.randrange(3, 90) for _ in range(rng.randint(40, 120))]
        rewards = [float(s % 3 == 0) for s in range(GROUP)]
        for reward, advantage in zip(rewards, train_grpo.advantages(rewards)):
            n = min(600, int(rng.lognormvariate(5.0, 0.8)) + 2)
            rows.append({"prompt_ids": prompt, "response_ids": [rng.randrange(3, 90) for _ in range(n)], "reward": reward,
                         "advantage": advantage})
    return rows


def grpo_model():
    """Random weights, small but for a real vocabulary."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=VOCAB, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=1,
                         pad_token_id=0, bos_token_id=None)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def longest(rows: list[dict]) -> int:
    """Width of a batch that pads prompts and responses apart, as TRL does."""
    return max(len(r["prompt_ids"]) for r in rows) + max(len(r["response_ids"]) for r in rows)


def ours_updates(model, rows: list[dict], args: argparse.Namespace, mark) -> None:
    """As many padded tokens a micro-batch as the references have."""
    flags = train_grpo.get_args(["--model", "m", "--data", "d", "--out", "o", "--kl-coef", "0", "--micro-batch-tokens",
                                 str(ROWS * longest(rows))])
    optimizer = training.make_optimizer(model, flags)
    for _ in range(args.runs + 1):
        mark(lambda: train_grpo.update(model, None, optimizer, rows, flags)["grad_norm"])


def plain_updates(model, rows: list[dict], args: argparse.Namespace, mark) -> None:
    """The usual short loop: every row padded to the longest of all, logits of the whole micro-batch, log_softmax."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    T = max(len(r["prompt_ids"]) + len(r["response_ids"]) for r in rows)
    ids = torch.tensor([(r["prompt_ids"] + r["response_ids"] + [0] * T)[:T] for r in rows])  # (B, T)
    mask = torch.tensor([[len(r["prompt_ids"]) <= t < len(r["prompt_ids"]) + len(r["response_ids"]) for t in range(T)]
                         for r in rows])
    advantage = torch.tensor([r["advantage"] for r in rows])[:, None]

    def update() -> float:
        for s in range(0, len(rows), ROWS):
            logits = model(input_ids=ids[s:s + ROWS], use_cache=False).logits[:, :-1]  # (B, T - 1, V)
            logp = F.log_softmax(logits, -1).gather(-1, ids[s:s + ROWS, 1:, None])[..., 0]
            ratio = (logp - logp.detach()).exp()
            a = advantage[s:s + ROWS]
            loss = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
            ((loss * mask[s:s + ROWS, 1:]).sum() / mask[:, 1:].sum()).backward()  # denominator: response tokens of the step
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    for _ in range(args.runs + 1):
        mark(update)


def trl_updates(model, rows: list[dict], args: argparse.Namespace, mark) -> None:
    """GRPOTrainer on the same rows (its own rollout_func), token-mean loss, no KL, no checkpointing. What it does before the
    first micro-batch (sampling, rewards, decoding for its logs) is not counted."""
    try:
        from datasets import Dataset
        from transformers import AutoTokenizer, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except (ImportError, RuntimeError) as e:  # RuntimeError: trl imports its parts late
        raise UserError(f"bench.py grpo needs TRL: pip install -r requirements-bench.txt ({str(e).splitlines()[-1]})") from None
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent / "toy_model")
    updates, prepare = [], GRPOTrainer._generate_and_score_completions
    seconds = {"prepare": 0.0}

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            start = time.process_time()
            try:
                return prepare(self, inputs)
            finally:
                seconds["prepare"] = time.process_time() - start

    class Timer(TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            self.start = time.process_time()

        def on_step_end(self, args, state, control, **more):
            updates.append(time.process_time() - self.start - seconds["prepare"])

    def rollouts(prompts, trainer):
        assert len(prompts) == len(rows)
        return {"prompt_ids": [r["prompt_ids"] for r in rows], "completion_ids": [r["response_ids"] for r in rows],
                "logprobs": None}

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(output_dir=folder, per_device_train_batch_size=ROWS, gradient_accumulation_steps=len(rows) // ROWS,
                            num_generations=GROUP, max_completion_length=600, beta=0.0, loss_type="dapo", epsilon=0.2,
                            learning_rate=1e-5, lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=1.0, bf16=False,
                            gradient_checkpointing=False, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1,
                            max_steps=args.runs + 1, shuffle_dataset=False, disable_tqdm=True, seed=0)
        trainer = Trainer(model=model, args=config, processing_class=tokenizer, rollout_func=rollouts, callbacks=[Timer()],
                          reward_funcs=lambda completions, **more: [r["reward"] for r in rows],
                          train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(GROUPS)]}))

        def run():
            trainer.train()
            return next(x["grad_norm"] for x in trainer.state.log_history if "grad_norm" in x)

        mark(run, updates)


def grpo_child(args: argparse.Namespace) -> None:
    """One contender in this process: processor seconds (of one
    thread, so that a busy machine does not count) of each update but the first, which allocates; and the largest resident set."""
    model, rows, seconds, norms = grpo_model(), grpo_rows(), [], []
    start = []

    def mark(function, own: list[float] | None = None):
        if not start:
            start.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        begun = time.process_time()
        norms.append(function())
        seconds.extend([time.process_time() - begun] if own is None else own)

    {"ours": ours_updates, "trl": trl_updates, "plain": plain_updates}[args.only](model, rows, args, mark)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux gives KiB
    print(json.dumps({"seconds": seconds[1:], "peak": peak, "beyond_start": peak - start[0], "grad_norm": norms[0]}))


def bench_grpo(args: argparse.Namespace) -> None:
    if args.only:
        return grpo_child(args)
    rows, results = grpo_rows(), {"ours": [], "trl": [], "plain": []}
    for _ in range(args.rounds):  # interleaved, a process each
        for name, found in results.items():
            child = subprocess.run([sys.executable, __file__, "grpo", "--only", name, "--runs", str(args.runs)],
                                   capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
            if child.returncode:
                raise UserError(child.stderr.strip().splitlines()[-1].removeprefix("bench.py: error: "))
            found.append(json.loads(child.stdout.splitlines()[-1]))
    seconds = {k: statistics.median(t for r in v for t in r["seconds"]) for k, v in results.items()}
    peak, beyond = ({k: statistics.median(r[x] for r in v) for k, v in results.items()} for x in ("peak", "beyond_start"))
    norm = {k: v[0]["grad_norm"] for k, v in results.items()}
    real = sum(len(r["prompt_ids"]) + len(r["response_ids"]) for r in rows)
    for name in ("trl", "plain"):
        facts = {"rows": len(rows), "tokens": real, "padded_to_longest": len(rows) * longest(rows), "vocabulary": VOCAB,
                 "grad_norm_relative_difference": abs(norm["ours"] / norm[name] - 1)}
        report(f"grpo_step_time_vs_{name}", seconds["ours"], seconds[name], "seconds", threads=1, **facts)
        report(f"grpo_peak_memory_vs_{name}", peak["ours"], peak[name], "bytes", ours_beyond_start=beyond["ours"],
               reference_beyond_start=beyond[name], ratio_beyond_start=round(beyond[name] / beyond["ours"], 3))


# --- memory: the formula of the README --------------------------------------------------------------------------------
QWEN = {"Qwen2.5-1.5B": Qwen2Config(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                                    num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True),
        "Qwen3-8B": Qwen3Config(vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                                num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False)}


def sizes(c) -> tuple[int, int, int, int, int]:
    """D, Q, K, I and L of a Qwen2 or Qwen3: widths of the model, its queries, its keys, its feed-forward layers; its blocks."""
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return (c.hidden_size, c.num_attention_heads * head, c.num_key_value_heads * head, c.intermediate_size, c.num_hidden_layers)


def parameters(c) -> tuple[int, int]:
    """Of the root that is gathered for a whole pass (embedding, last norm, head) and of one block."""
    D, Q, K, I, _ = sizes(c)
    extra = 2 * Q // c.num_attention_heads if c.model_type == "qwen3" else Q + 2 * K  # norms of a query and a key; or biases
    return c.vocab_size * D * (1 if c.tie_word_embeddings else 2) + D, 2 * D * Q + 2 * D * K + 3 * D * I + 2 * D + extra


def block_bytes(c, size: int) -> int:
    """What autograd keeps of one block for each token. size: bytes of an element, 2 or 4; norms keep float32 as well."""
    D, Q, K, I, _ = sizes(c)
    norm = 4 + size  # its input, converted, and its result before the weight
    keys = (norm + size) * (Q + K) if c.model_type == "qwen3" else size * (Q + K)  # a norm on each; then rotated, as SDPA keeps them
    heads = 4 * (c.num_attention_heads * 2 + c.num_key_value_heads) if c.model_type == "qwen3" else 4 * c.num_attention_heads
    return 2 * D * (norm + size) + keys + size * (K + Q + 4 * I) + heads + 8  # values, SDPA's result, the feed-forward layer's four


def activation_bytes(c, size: int, tokens: int, responses: int, checkpointed: bool) -> int:
    """Kept between forward and backward of a micro-batch of so many padded tokens, so many of them in responses."""
    D, *_, L = sizes(c)
    return tokens * (L * (size * D if checkpointed else block_bytes(c, size)) + D * (4 + size)) + responses * D * size


def peak_bytes(c, processes: int, tokens: int, checkpointed: bool, sharded: bool = True) -> dict[str, float]:
    """GB of one process of train_grpo.py in bfloat16, by part. Reduction: gradients of the root in bfloat16 and, to be summed,
    in float32. Head: logits, log-probabilities and their gradient, float32. unsharded: as it was, each process a whole model."""
    root, block = parameters(c)
    P = root + sizes(c)[-1] * block
    parts = {"states": P * (16 + 2) / (processes if sharded else 1), "actor": 2 * P, "gathered": (2 + 2 + 4) * (root + block),
             "activations": activation_bytes(c, 2, tokens, tokens, checkpointed) + checkpointed * tokens * block_bytes(c, 2),
             "head": training.HEAD_ROWS * c.vocab_size * 18}
    return {k: round(v / 1e9, 1) for k, v in (parts | {"all": sum(parts.values())}).items()}


def bench_memory(args: argparse.Namespace) -> None:
    folder = Path(__file__).parent / "toy_model"
    rows = [{"prompt_ids": [5] * 100, "response_ids": [6] * 400}] * 2
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
        for checkpointed in (False, True):
            with common.checkpointed(model, checkpointed):
                kept = saved_bytes(model, training.response_logprobs, model, rows)
            report(f"activations_{str(dtype)[6:]}" + "_checkpointed" * checkpointed, kept,
                   activation_bytes(model.config, dtype.itemsize, 1000, 800, checkpointed), "bytes", reference_is="the formula")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    optimizer = training.make_optimizer(model, argparse.Namespace(lr=1e-5, weight_decay=0.01))
    training.response_logprobs(model, rows)[0].sum().backward()
    states = 2 * sum(p.nbytes for p in model.parameters())  # weights and gradients
    training.apply_gradients(model, optimizer, 1.0)
    states += sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    root, block = parameters(model.config)
    report("states", states, 16 * (root + model.config.num_hidden_layers * block), "bytes", reference_is="the formula")
    for name, processes, sharded in (("Qwen2.5-1.5B", 1, True), ("Qwen2.5-1.5B", 4, True), ("Qwen2.5-1.5B", 4, False),
                                     ("Qwen3-8B", 8, True), ("Qwen3-8B", 8, False)):
        for checkpointed in (False, True):
            print(json.dumps({"measure": "peak_computed", "model": name, "processes": processes, "sharded": sharded,
                              "checkpointed": checkpointed, "unit": "GB",
                              **peak_bytes(QWEN[name], processes, 16384, checkpointed, sharded)}))


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["revise", "grpo", "memory"], help="[ours] what to measure")
    parser.add_argument("--device", default="auto", help="[ours] auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="[ours] as elsewhere")
    parser.add_argument("--runs", type=int, default=5, help="[ours] interleaved runs of each; the median is reported")
    parser.add_argument("--rounds", type=int, default=3, help="[ours] grpo: processes of each, in turn")
    parser.add_argument("--only", choices=["ours", "trl", "plain"], help="[ours] grpo: one of them, in this process")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    {"revise": bench_revise, "grpo": bench_grpo, "memory": bench_memory}[args.what](args)


if __name__ == "__main__":
    common.run_script(get_args, main)
