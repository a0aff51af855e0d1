"""What the two trainers share: sharding, log-probabilities, the optimizer step, logs, checkpoints.

Losses are sums over response tokens divided by the number of response tokens of the whole optimizer
step: all micro-batches and all processes, counted before the first forward. So neither changes a
gradient.

Sharded (--shard), every process holds a part of each parameter, gradient and moment, and FSDP2
gathers one block at a time. Then each forward and backward is a collective: all processes run the
same number of them (`equal_batches`), inside FSDP2's hooks (`as_forward`).
"""
import argparse
import functools
import importlib.util
import json
import os
import resource
import shutil
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from helpers import common
from helpers.common import COUNT, POSITIVE, Policy, UserError, checked
from helpers.sampling import row_key

# Dimension key: B sequences, T time, M response tokens of a micro-batch, V vocabulary, D width

# Rows whose logits exist at a time: 156 MB in float32 at 152k ids, a few copies of it in the
# backward. In bfloat16 the head's gradient is summed over chunks in bfloat16: 0.7 % of its norm off
# with 32 chunks, 0.2 % with one (measured)
HEAD_ROWS = 256
FILE_BYTES = 4 * 2**30  # of a model file, unless a single tensor is larger
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter
REMEDY = "remove it, and the run continues from the one before"
LOGGERS = ("tensorboard", "wandb")


# --- sharding -------------------------------------------------------------------------------------
def is_sharded(args: argparse.Namespace, device: torch.device) -> bool:
    """--shard auto: on for several GPUs and for bfloat16, also on one process: FSDP2 is what runs
    bfloat16 over float32 weights. It rounds them as the copy that samples and the reference have
    them, so that the ratio to the sampling policy starts at exactly 1 and the KL at 0. Autocast
    would keep float32 between the blocks, and be a third policy."""
    if args.shard == "off" and args.dtype == "bfloat16":
        raise UserError("--shard off: --dtype bfloat16 is computed by sharding")
    return args.shard == "on" or args.shard == "auto" and (
        args.dtype == "bfloat16" or device.type == "cuda" and common.world_size() > 1)


def load_model(args: argparse.Namespace, device: torch.device, train: bool = False) -> Policy:
    """common.load_model, sharded where --shard says so: each process first holds the whole model in
    host memory."""
    if not is_sharded(args, device):
        return common.load_model(args, device, train)
    policy = common.load_model(args, torch.device("cpu"), train)
    model = policy.model
    common.start_group()
    how = {"mesh": init_device_mesh(device.type, (common.world_size(),))}
    if args.dtype == "bfloat16":
        how["mp_policy"] = fsdp.MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    blocks = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    for module in [*blocks, model]:
        # Keeps this process's rows of each parameter, on the device. What is not trained keeps
        # embedding and head gathered, since they do not change
        fsdp.fully_shard(module, **how, reshard_after_forward=train or module is not model)
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)  # gradients are summed; the default is their mean
    model.call_as_forward = lambda function: function()
    fsdp.register_fsdp_forward_method(model, "call_as_forward")
    return policy


def as_forward(function):
    """For a function(model, ...) that uses modules of a model which may be sharded. Embedding and
    head belong to the root, whose hooks gather them for the root's own forward, or for a method
    named to FSDP2 as one. Not to be nested for one model."""
    @functools.wraps(function)
    def call(model, *args, **more):
        if isinstance(model, fsdp.FSDPModule):
            return model.call_as_forward(lambda: function(model, *args, **more))
        return function(model, *args, **more)
    return call


def full_tensor(t: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes, which all have to ask; any other as it is."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def load_actor(model, args: argparse.Namespace, device: torch.device):
    """The model that samples and revises, in --dtype: of a sharded one a whole copy on every
    process, else the trained one itself."""
    return common.load_model(args, device).model if isinstance(model, fsdp.FSDPModule) else model


@torch.no_grad()
def refresh_actor(actor, model) -> None:
    """Trained weights into the actor, a parameter at a time, rounded as FSDP2 rounds them."""
    if actor is not model:
        for copy, p in zip(actor.parameters(), model.parameters(), strict=True):
            copy.copy_(full_tensor(p.to(copy.dtype)))


# --- log-probabilities ----------------------------------------------------------------------------
def equal_batches(rows: list[dict], max_tokens: int) -> list[list[dict]]:
    """Rows in batches of at most max_tokens padded tokens (a single row may be longer), and empty
    ones up to the largest number that any process has: FSDP's collectives take all processes."""
    batches = common.batches_by_length(
        rows, lambda r: len(r["prompt_ids"]) + len(r["response_ids"]), max_tokens)
    return batches + [[]] * (max(common.gather(len(batches))) - len(batches))


def head_logprobs(head, hidden: Tensor, targets: Tensor,
                  entropy: bool = True) -> tuple[Tensor, Tensor | None]:
    """log p(target) and entropy of the next-token distribution, (M,) each, from hidden (M, D) and
    targets (M,)."""
    logp = F.log_softmax(head(hidden).float(), -1)  # (M, V)
    entropies = -(logp.detach().exp() * logp.detach()).sum(-1) if entropy else None
    return logp.gather(1, targets[:, None])[:, 0], entropies


def response_hidden(model, rows: list[dict],
                    prompt: str = "prompt_ids") -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that predict each response token of the rows (M, D), those tokens (M,) and
    their rows (M,), row by row. prompt: the field of the prompt's ids.

    Rows are right-padded: under a causal mask padding is invisible to what precedes it, so there is
    no mask to get wrong. No rows: one padding token goes through, and M is 0.
    """
    T = max((len(r[prompt]) + len(r["response_ids"]) for r in rows), default=1)
    ids = torch.zeros(max(len(rows), 1), T, dtype=torch.long)
    source, targets, owner = [], [], []
    for b, r in enumerate(rows):
        q, n = len(r[prompt]), len(r["response_ids"])
        ids[b, :q + n] = torch.tensor(r[prompt] + r["response_ids"])
        source += range(b * T + q - 1, b * T + q + n - 1)  # the next-token shift: t-1 predicts t
        targets += r["response_ids"]
        owner += [b] * n
    source, targets, owner = (torch.tensor(x, dtype=torch.long, device=model.device)
                              for x in (source, targets, owner))
    hidden = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[source], targets, owner  # of (B, T, D)


@as_forward
def response_logprobs(model, rows: list[dict], head_rows: int = HEAD_ROWS,
                      entropy: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probabilities of every response token of the rows (M,) with gradient, entropies (M,) if
    asked, and the tokens' rows (M,). The head runs on `head_rows` response positions at a time and
    is recomputed in the backward: B x T x V logits never exist."""
    hidden, targets, owner = response_hidden(model, rows)
    head = model.get_output_embeddings()
    parts = [checkpoint(head_logprobs, head, hidden[s:s + head_rows], targets[s:s + head_rows],
                        entropy, use_reentrant=False)
             for s in range(0, max(len(targets), 1), head_rows)]
    logp, entropies = zip(*parts)
    return torch.cat(logp), torch.cat(entropies) if entropy else None, owner


# --- optimizer step -------------------------------------------------------------------------------
def make_optimizer(model, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW at a constant --lr [Table 7]; the paper names no weight decay: 0.01, as VERL has it."""
    return torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.01,
                             fused=model.device.type == "cuda")


def total(value: float) -> float:
    """Sum of a number over all processes."""
    return sum(common.gather(value))


def apply_gradients(model, optimizer, grad_clip: float) -> float:
    """Sum gradients over processes (those of a sharded model have been, in the backward), clip
    their norm, step. Returns the norm before clipping."""
    params = [p for p in model.parameters() if p.requires_grad]
    common.barrier()  # says which process is missing, if one is; a collective does not
    if common.world_size() > 1 and not isinstance(model, fsdp.FSDPModule):
        for p in params:
            dist.all_reduce(p.grad)
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(params, grad_clip))
    if not norm.isfinite():  # on every process: from here on all weights would be nan
        raise UserError("the gradient is not finite: nothing was changed by this step; a lower "
                        "--lr, or float32, may help")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def draw_rows(count: int, start: int, size: int, seed: int) -> list[int]:
    """Entries start..start+size-1 of one permutation of range(count) after the other."""
    perms = {}
    for epoch in range(start // count, (start + size - 1) // count + 1):
        generator = torch.Generator().manual_seed(row_key(seed, "epoch", epoch))
        perms[epoch] = torch.randperm(count, generator=generator).tolist()
    return [perms[i // count][i % count] for i in range(start, start + size)]


# --- what a run reports ---------------------------------------------------------------------------
def step_bar(label: str, done: int, steps: int) -> tqdm:
    """The steps that are still to do, counted from 1."""
    return tqdm(range(done + 1, steps + 1), desc=label, unit="step", initial=done, total=steps,
                disable=common.rank() > 0)


def open_logs(out: Path, args: argparse.Namespace, done: int):
    """A function that takes one step's metrics to OUT/metrics.jsonl and to what --log-to names.
    done: steps that are in them; what TensorBoard has beyond is hidden."""
    if common.rank() > 0:
        return lambda metrics: None
    if "tensorboard" in args.log_to:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)
    if "wandb" in args.log_to:
        import wandb
        # The folder's own id: a continued run goes on there, and wandb ignores steps that it has
        run = wandb.init(name=out.name, id=common.file_digest(out / "run.json"), resume="allow",
                         dir=str(out), config=vars(args))

    def log(metrics: dict) -> None:
        common.append_jsonl(out / "metrics.jsonl", [metrics])
        if "tensorboard" in args.log_to:
            for key in metrics.keys() - {"step"}:
                board.add_scalar(key, metrics[key], metrics["step"])
            board.flush()
        if "wandb" in args.log_to:
            run.log(metrics, step=metrics["step"])
    return log


def peak_memory(device: torch.device) -> float:
    """Most memory this process has had, in GB (10^9 bytes): of the GPU's allocator, or resident."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


# --- checkpoints ----------------------------------------------------------------------------------
# Safetensors and JSON alone. They hold full tensors, so that a run continues on any number of
# processes, sharded or not, and a checkpoint is a model folder. Written aside, then renamed.
def to_rank_0(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors on rank 0's CPU, gathered one at a time; {} elsewhere. All have to ask."""
    found = {}
    for name, t in tensors.items():
        t = full_tensor(t.detach()).cpu().contiguous()
        if common.rank() == 0:
            found[name] = t
    return found


def save_model(folder: Path, policy: Policy) -> None:
    """A new folder that from_pretrained loads."""
    weights = to_rank_0(dict(policy.model.named_parameters()))
    if common.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        policy.model.save_pretrained(folder, state_dict=weights, max_shard_size=FILE_BYTES)
        policy.tokenizer.save_pretrained(folder)


def save_checkpoint(out: Path, policy: Policy, optimizer, state: dict, keep: int) -> None:
    """OUT/checkpoint-STEP: model, optimizer and state. The last `keep` stay, all if it is 0, those
    before the last two without the optimizer."""
    folder, aside = out / f"checkpoint-{state['step']:06d}", out / "checkpoint.tmp"
    save_model(aside, policy)
    for key in MOMENTS:  # a file each: no more memory than the weights
        tensors = to_rank_0({f"{name}.{key}": optimizer.state[p][key]
                             for name, p in policy.model.named_parameters() if optimizer.state[p]})
        if common.rank() == 0:
            save_file(tensors, aside / f"optimizer-{key}.safetensors")
    if common.rank() == 0:
        (aside / "state.json").write_text(json.dumps(state) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        folders = sorted(out.glob("checkpoint-*"))
        for old in folders[:-keep]:  # [:-0] is none
            os.replace(old, aside)  # so that a kill leaves no half of it under its name
            shutil.rmtree(aside)
        drop_optimizers(folders[:-2])
    common.barrier()


def drop_optimizers(folders: Iterable[Path]) -> None:
    """Of checkpoints that nothing continues from: what stays is a model, a third of the size."""
    for path in (p for folder in folders for p in folder.glob("optimizer-*")):
        path.unlink()


def read_headers(folder: Path) -> tuple[dict, set[str]]:
    """A checkpoint's state and the names of its tensors. Raises UserError if a file is cut or not
    there. A kill leaves no such folder: it is renamed when complete."""
    optimizer = [folder / f"optimizer-{key}.safetensors" for key in MOMENTS]
    try:
        state = json.loads((folder / "state.json").read_text())
        state["step"] += 0  # there, and a number
        files = [*folder.glob("model*.safetensors"), *optimizer]
        return state, set().union(*(safe_open(file, "pt").keys() for file in files))
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as e:
        raise UserError(f"{folder}: damaged ({e}); {REMEDY}") from None


@torch.no_grad()
def load_checkpoint(out: Path, model, optimizer, steps: int) -> dict:
    """Fill model and optimizer from the last checkpoint, of which a process reads what it holds,
    and cut the logs back to it. Returns its state, {"step": 0} if there is none."""
    folder, state = max(out.glob("checkpoint-*"), default=None), {"step": 0}
    if folder:
        state, names = read_headers(folder)
        if state["step"] > steps:
            raise UserError(f"--steps {steps}: --out holds a checkpoint of step {state['step']}")
        wanted, moments = {name: p.detach() for name, p in model.named_parameters()}, {}
        for name, p in model.named_parameters():
            optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                                  "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            moments |= {f"{name}.{key}": t for key, t in optimizer.state[p].items()}
        if names & moments.keys():  # else no step had been taken
            wanted |= moments
        if names != wanted.keys():
            raise UserError(f"{folder}: damaged, or not of --model: {len(names ^ wanted.keys())} "
                            f"tensors such as {min(names ^ wanted.keys())}; {REMEDY}")
        try:
            with warnings.catch_warnings(action="ignore"):  # of one process that is in no group
                dcp.load(wanted, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
        except dcp.CheckpointException:  # tensors of other shapes
            raise UserError(f"{folder}: damaged, or not of --model; {REMEDY}") from None
    if common.rank() == 0:
        for path in (out / "metrics.jsonl", out / "samples.jsonl"):
            if path.exists():
                common.cut_torn_line(path)
                rows = [r for r in common.read_jsonl(path) if r["step"] <= state["step"]]
                common.write_atomic(path, map(common.to_line, rows))
    common.barrier()
    return state


def finish(out: Path, policy: Policy, steps: int) -> None:
    """OUT/model, written aside and renamed."""
    save_model(out / "model.tmp", policy)
    if common.rank() == 0:
        os.replace(out / "model.tmp", out / "model")
        shutil.rmtree(out / "checkpoint.tmp", ignore_errors=True)  # of a kill
        drop_optimizers(out.glob("checkpoint-*"))
        print(f"{steps} steps; model in {out / 'model'}")
    common.barrier()


def is_finished(out: Path, steps: int) -> bool:
    """Whether OUT/model is there. Raises UserError if more steps than it has are asked for."""
    if not (out / "model").exists():
        return False
    last = common.read_jsonl(out / "metrics.jsonl")[-1]["step"]
    if steps > last:
        raise UserError(f"--steps {steps}: {out / 'model'} was finished after {last} steps; a new "
                        "run can start from it as --model")
    if common.rank() == 0:
        drop_optimizers(out.glob("checkpoint-*"))  # where a kill came before
        print(f"{out / 'model'} is trained already")
    return True


# --- flags ----------------------------------------------------------------------------------------
def logger(name: str) -> str:
    """An argparse type: one of LOGGERS that is installed."""
    if name not in LOGGERS:
        raise argparse.ArgumentTypeError(f"{name} is neither {' nor '.join(LOGGERS)}")
    if not importlib.util.find_spec(name):
        raise argparse.ArgumentTypeError(f"{name} is not installed: pip install {name}")
    return name


def add_training_args(parser: argparse.ArgumentParser) -> None:
    """Flags that the trainers have in common."""
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=POSITIVE, default=100,
        help="optimizer steps in all; a run that is not finished may continue with another number")
    add("--lr", type=checked(float, lambda x: 0 <= x < 1), default=1e-5,
        help="[Table 7] constant learning rate of AdamW")
    add("--grad-clip", type=checked(float, lambda x: x > 0), default=1.0,
        help="[Table 7] largest gradient norm")
    add("--train-tokens", type=POSITIVE, default=16384,
        help="padded tokens per forward and backward: the memory flag of the update")
    add("--checkpoint-activations", action="store_true",
        help="recompute activations in every backward: less memory for long rows, a third slower")
    add("--shard", default="auto", choices=["auto", "on", "off"],
        help="weights, gradients and moments spread over all processes (FSDP2); auto: for bfloat16 "
             "and for several GPUs")
    add("--save-every", type=COUNT, default=50, help="steps between checkpoints; 0 for none")
    add("--keep", type=COUNT, default=2,
        help="checkpoints that stay; 0 for all. A run continues from the last two; all are models "
             "for eval.py --model OUT/checkpoint-*")
    add("--log-to", nargs="*", type=logger, default=[], metavar="LOGGER",
        help="metrics to tensorboard or wandb (WANDB_PROJECT) as well")


def check_plain_sampling(args: argparse.Namespace) -> None:
    """Raises UserError for flags with which samples are not those of the policy that is trained."""
    for flag, plain in {"temperature": 1, "top_p": 1, "top_k": 0}.items():
        if getattr(args, flag) != plain:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: training takes "
                            f"{plain} alone, since the policy that samples is the one that learns")
