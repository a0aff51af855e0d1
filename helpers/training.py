"""What the two trainers share: sharding, micro-batches, log-probabilities with a chunked head, the step, logs.

Losses are sums over response tokens divided by the number of response tokens of the whole optimizer step: all
micro-batches and all processes, counted before the first forward. So neither changes a gradient.

Sharded (--shard), every process holds 1/W of each parameter, gradient and moment, and gathers one block at a time. Then
each forward and backward is a collective: all processes run the same number of them (`plan`), inside the hooks of FSDP2
(`gathered`).
"""
import argparse
import functools
import importlib
import math
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from helpers import common
from helpers.common import UserError
from helpers.sampling import row_key

# Dimension key: B sequences, T time, M response tokens of a micro-batch, V vocabulary, D model width, W processes

# Rows whose logits exist at a time: 156 MB in float32 at 152k ids, a few copies of it in the backward. In bfloat16 the
# head's gradient is summed over chunks in bfloat16: 0.7 % of its norm off with 32 chunks, 0.2 % with one (measured)
HEAD_ROWS = 256


# --- sharding --------------------------------------------------------------------------------------------------------
def is_sharded(args: argparse.Namespace, device: torch.device) -> bool:
    """--shard auto: on for several GPUs and for bfloat16. Raises UserError for --shard off in bfloat16.

    FSDP2 is also what computes in bfloat16 over float32 weights, on one process too: it rounds the weights, as the copy
    that samples and the reference have them, so that the ratio to the sampling policy starts at exactly 1 and the
    KL at 0. Autocast would keep float32 between the blocks, and be a third policy. Several CPU processes share one
    memory, in which sharding saves little; a float32 model on one device is left as it is, and samples itself.
    """
    if args.shard == "off" and args.dtype == "bfloat16":
        raise UserError("--shard off: --dtype bfloat16 is computed by sharding, on one process too; leave --shard out")
    return args.shard == "on" or args.shard == "auto" and (
        args.dtype == "bfloat16" or device.type == "cuda" and common.world_size() > 1)


def load_model(args: argparse.Namespace, device: torch.device, train: bool = False) -> common.Policy:
    """common.load_model, sharded where --shard says so. Host memory: each process first holds the whole model."""
    if not is_sharded(args, device):
        return common.load_model(args, device, train)
    policy = common.load_model(args, torch.device("cpu"), train)
    model = policy.model
    common.start_group()
    how = {"mesh": init_device_mesh(device.type, (common.world_size(),))}
    if args.dtype == "bfloat16":
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in [*(m for m in model.modules() if type(m).__name__ in model._no_split_modules), model]:
        # Moves its parameters to the device and keeps this process's rows of each. What is not trained keeps embedding
        # and head gathered: they do not change, and a teacher's head is used again in the backward.
        fully_shard(module, **how, reshard_after_forward=train or module is not model)
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)  # gradients are summed, as in apply_gradients; the default is their mean
    model.inside = lambda function: function()
    register_fsdp_forward_method(model, "inside")
    return policy


def gathered(function):
    """For a function(model, ...) that uses modules of a sharded model. The root's hooks gather embedding and head; they
    run for the root's own forward, or for a method named to FSDP2. Not to be nested."""
    @functools.wraps(function)
    def call(model, *args, **more):
        if isinstance(model, FSDPModule):
            return model.inside(lambda: function(model, *args, **more))
        return function(model, *args, **more)
    return call


def whole(t: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes, which all have to ask; any other tensor as it is."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def load_actor(model, args: argparse.Namespace, device: torch.device):
    """The model that samples and revises: whole, on every process, in --dtype.
    The trained one itself where it is so."""
    return common.load_model(args, device).model if isinstance(model, FSDPModule) else model


@torch.no_grad()
def refresh(actor, model) -> None:
    """Trained weights into the actor, a parameter at a time, rounded before they travel as FSDP2 rounds them."""
    if actor is not model:
        for copy, p in zip(actor.parameters(), model.parameters(), strict=True):
            copy.copy_(whole(p.to(copy.dtype)))


# --- log-probabilities -----------------------------------------------------------------------------------------------
def micro_batches(rows: list[dict], max_tokens: int) -> list[list[int]]:
    """Indices of rows in micro-batches of at most max_tokens padded tokens (one row may be longer)."""
    return common.batches_by_length([len(r["prompt_ids"]) + len(r["response_ids"]) for r in rows], max_tokens)


def plan(rows: list[dict], max_tokens: int) -> list[list[int]]:
    """micro_batches, and empty ones up to the largest number that any process has: a forward and a backward of one
    token that count for nothing, since gathering weights and reducing gradients take all processes."""
    batches = micro_batches(rows, max_tokens)
    return batches + [[]] * (max(common.gather(len(batches))) - len(batches))


def head_logprobs(head, hidden: Tensor, targets: Tensor, entropy: bool = True) -> tuple[Tensor, Tensor | None]:
    """log p(target) and entropy of the next-token distribution, (M,) each, from hidden (M, D) and targets (M,)."""
    logp = F.log_softmax(head(hidden).float(), -1)  # (M, V)
    spread = -(logp.detach().exp() * logp.detach()).sum(-1) if entropy else None
    return logp.gather(1, targets[:, None])[:, 0], spread


def head_divergence(head, hidden: Tensor, teacher_head, teacher_hidden: Tensor, beta: float,
                    clip: float) -> tuple[Tensor, Tensor]:
    """JSD_beta(teacher || student) of the next-token distributions and the student's entropy,
    (M,) each, from hidden (M, D).

    beta KL(P || M) + (1 - beta) KL(Q || M) with P the teacher, Q the student, M = beta P + (1 - beta) Q: GKD (arXiv
    2306.13649). As there, beta 0 and 1 stand for the limits KL(P || Q) and KL(Q || P), not for the 0 of the formula.
    clip: largest contribution of one vocabulary entry (OPSD v3); 0 is off. The gradient is the student's alone.
    """
    q = F.log_softmax(head(hidden).float(), -1)  # (M, V)
    with torch.no_grad():
        p = F.log_softmax(teacher_head(teacher_hidden).float(), -1)  # (M, V)
    if beta == 0:
        terms = p.exp() * (p - q)
    elif beta == 1:
        terms = q.exp() * (q - p)
    else:
        mixture = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
        terms = beta * p.exp() * (p - mixture) + (1 - beta) * q.exp() * (q - mixture)
    if clip:
        terms = terms.clamp(max=clip)
    return terms.sum(-1), -(q.detach().exp() * q.detach()).sum(-1)


def response_hidden(model, rows: list[dict], prompt: str = "prompt_ids") -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that predict each response token of the rows (M, D), those tokens (M,) and their rows (M,).

    Tokens come row by row. Rows are right-padded: under a causal mask padding is invisible to what precedes it, so
    there is no mask to get wrong, and the tokens to score are chosen by length, never by id (padding may equal EOS).
    No rows: M is 0.
    """
    device = model.device
    T = max((len(r[prompt]) + len(r["response_ids"]) for r in rows), default=1)
    ids = torch.zeros(max(len(rows), 1), T, dtype=torch.long)
    source, targets, owner = [], [], []
    for b, r in enumerate(rows):
        q, n = len(r[prompt]), len(r["response_ids"])
        ids[b, :q + n] = torch.tensor(r[prompt] + r["response_ids"])
        source += range(b * T + q - 1, b * T + q + n - 1)  # the next-token shift: slot t-1 predicts token t
        targets += r["response_ids"]
        owner += [b] * n
    hidden = model.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state  # (B, T, D)
    hidden = hidden.reshape(-1, hidden.shape[-1])[torch.tensor(source, dtype=torch.long, device=device)]  # (M, D)
    return hidden, *(torch.tensor(x, dtype=torch.long, device=device) for x in (targets, owner))


@gathered
def response_logprobs(model, rows: list[dict], head_rows: int = HEAD_ROWS,
                      entropy: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probabilities of every response token of the rows, (M,) with gradient; entropies (M,) if asked;
    owner row (M,).

    The head runs on `head_rows` response positions at a time and is recomputed in the backward:
    B x T x V logits never exist.
    """
    hidden, targets, owner = response_hidden(model, rows)
    head = model.get_output_embeddings()
    parts = [checkpoint(head_logprobs, head, hidden[s:s + head_rows], targets[s:s + head_rows], entropy,
                        use_reentrant=False) for s in range(0, max(len(targets), 1), head_rows)]
    logp, entropies = zip(*parts)
    return torch.cat(logp), torch.cat(entropies) if entropy else None, owner


@gathered
def response_divergence(model, teacher, rows: list[dict], beta: float, clip: float,
                        head_rows: int = HEAD_ROWS) -> tuple[Tensor, Tensor]:
    """head_divergence at every response token of the rows, (M,) with gradient in `model`; the model's entropies (M,).

    The teacher reads the same responses after `teacher_ids` in place of `prompt_ids`. Chunked as response_logprobs is.
    """
    with torch.no_grad():
        wanted = gathered(response_hidden)(teacher, rows, "teacher_ids")[0]  # (M, D)
    hidden = response_hidden(model, rows)[0]
    heads = model.get_output_embeddings(), teacher.get_output_embeddings()
    parts = [checkpoint(head_divergence, heads[0], hidden[s:s + head_rows], heads[1], wanted[s:s + head_rows], beta,
                        clip, use_reentrant=False) for s in range(0, max(len(hidden), 1), head_rows)]
    divergence, entropies = zip(*parts)
    return torch.cat(divergence), torch.cat(entropies)


# --- optimizer step --------------------------------------------------------------------------------------------------
def make_optimizer(model, args: argparse.Namespace) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay,
                             fused=model.device.type == "cuda")


def total(value: float) -> float:
    """Sum of a number over all processes."""
    return sum(common.gather(value))


def apply_gradients(model, optimizer, grad_clip: float) -> float:
    """Sum gradients over processes, clip their norm, step. Returns the norm before clipping.

    Losses are divided by global token counts already, so gradients are summed and not averaged. Those of a sharded
    model have been summed in the backward.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    common.barrier()  # says which process is missing, if one is; a collective does not
    if common.world_size() > 1 and not isinstance(model, FSDPModule):
        for p in params:
            dist.all_reduce(p.grad)
    norm = whole(torch.nn.utils.clip_grad_norm_(params, grad_clip))
    if not norm.isfinite():  # on every process: from here on all weights would be nan
        raise UserError("the gradient is not finite: nothing was changed by this step; "
                        "a lower --lr, or float32, may help")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


# --- data order ------------------------------------------------------------------------------------------------------
def draw_rows(count: int, start: int, size: int, seed: int) -> list[int]:
    """Entries start..start+size-1 of the endless sequence of one permutation of range(count) per epoch."""
    perms = {}
    for epoch in range(start // count, (start + size - 1) // count + 1):
        generator = torch.Generator().manual_seed(row_key(seed, "epoch", epoch))
        perms[epoch] = torch.randperm(count, generator=generator).tolist()
    return [perms[i // count][i % count] for i in range(start, start + size)]


# --- what a run reports ----------------------------------------------------------------------------------------------
def open_logs(out: Path, args: argparse.Namespace, step: int):
    """A function that takes one step's metrics to OUT/metrics.jsonl (or another file) and, where asked for, to
    TensorBoard in OUT/tensorboard and to wandb.
    step: the last one done before; what TensorBoard has beyond it is hidden.
    """
    if common.rank() > 0:
        return lambda metrics, name="metrics.jsonl": None
    board = run = None
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
    if args.wandb:
        import wandb
        # the folder's own id: a continued run goes on in the same place, and wandb ignores the steps that it has
        run = wandb.init(project=args.wandb, name=out.name, id=common.file_digest(out / "run.json"), resume="allow",
                         dir=str(out), config=vars(args))

    def log(metrics: dict, name: str = "metrics.jsonl") -> None:
        common.append_jsonl(out / name, [metrics])
        if board:
            for key in metrics.keys() - {"step"}:
                board.add_scalar(key, metrics[key], metrics["step"])
            board.flush()
        if run:
            run.log(metrics, step=metrics["step"])
    return log


def peak_memory(device: torch.device) -> float:
    """Most memory this process has had so far, in GB (10^9 bytes): of the GPU's allocator, or resident on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


# --- flags -----------------------------------------------------------------------------------------------------------
def add_training_args(parser: argparse.ArgumentParser) -> None:
    """Flags that both trainers have."""
    parser.add_argument("--steps", type=int, default=100, help="[ours] optimizer steps in all; a run that is not "
                        "finished may be continued with another number")
    parser.add_argument("--lr", type=float, default=1e-5, help="[Table 7] constant learning rate of AdamW")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="[ours] the paper names none; VERL's default")
    parser.add_argument("--grad-clip", type=float, default=1.0, help="[Table 7] largest gradient norm")
    parser.add_argument("--train-tokens", type=int, default=16384,
                        help="[ours] padded tokens per forward and backward: the memory flag of the update")
    parser.add_argument("--checkpoint-activations", action="store_true", help="[ours] recompute activations in every "
                        "backward: less memory for long rows, a third slower")
    parser.add_argument("--shard", default="auto", choices=["auto", "on", "off"],
                        help="[ours] spread weights, gradients and moments over all processes (FSDP2); auto: for "
                             "bfloat16 and for several GPUs")
    parser.add_argument("--save-every", type=int, default=50, help="[ours] steps between checkpoints; 0 for none")
    parser.add_argument("--tensorboard", action="store_true", help="[ours] metrics to OUT/tensorboard as well")
    parser.add_argument("--wandb", metavar="PROJECT", help="[ours] metrics to this project of Weights & Biases as well")


def check_training_args(args: argparse.Namespace) -> None:
    """Raises UserError naming the flag that is out of range."""
    for flag, good in {"steps": args.steps > 0, "batch_size": args.batch_size > 0, "lr": 0 <= args.lr < 1,
                       "weight_decay": args.weight_decay >= 0, "grad_clip": args.grad_clip > 0,
                       "train_tokens": args.train_tokens > 0, "save_every": args.save_every >= 0}.items():
        if not good:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is out of range")
    for flag, module in {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}.items():
        try:
            if getattr(args, flag):
                importlib.import_module(module)
        except ImportError:
            raise UserError(f"--{flag} needs a package that is not installed: pip install {flag}") from None


# These do not change a result in float32: the learning rate is constant, so neither do the steps still to come
FREE = ("device", "train_tokens", "checkpoint_activations", "shard", "save_every", "steps",
        "tensorboard", "wandb")
