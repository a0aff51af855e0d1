"""What the two trainers share: micro-batches, log-probabilities with a chunked head, the optimizer step, checkpoints.

Losses are sums over response tokens divided by the number of response tokens of the whole optimizer step: all
micro-batches and all processes, counted before the first forward. So neither changes a gradient.
"""
import argparse
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import common
import rollout
from common import UserError

# Dimension key: B sequences, T time, M response tokens of a micro-batch, V vocabulary, D model width

HEAD_ROWS = 1024  # rows whose logits exist at a time


# --- log-probabilities -----------------------------------------------------------------------------------------------
def micro_batches(rows: list[dict], max_tokens: int) -> list[list[int]]:
    """Indices of rows in micro-batches of at most max_tokens padded tokens (one row may be longer)."""
    return common.batches_by_length([len(r["prompt_ids"]) + len(r["response_ids"]) for r in rows], max_tokens)


def head_logprobs(head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy of the next-token distribution, (M,) each, from hidden (M, D) and targets (M,)."""
    logits = head(hidden).float()  # (M, V)
    logp = F.log_softmax(logits, -1)
    entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


def response_logprobs(model, rows: list[dict], head_rows: int = HEAD_ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of every response token of the rows, (M,) with gradient; entropies (M,); owner row (M,).

    Tokens come row by row. Rows are right-padded: under a causal mask padding is invisible to what precedes it, so there
    is no mask to get wrong, and the tokens to score are chosen by length, never by id (padding may equal EOS). The head
    runs on `head_rows` response positions at a time and is recomputed in the backward: B x T x V logits never exist.
    """
    device = model.device
    T = max(len(r["prompt_ids"]) + len(r["response_ids"]) for r in rows)
    ids = torch.zeros(len(rows), T, dtype=torch.long)
    source, targets, owner = [], [], []
    for b, r in enumerate(rows):
        q, n = len(r["prompt_ids"]), len(r["response_ids"])
        ids[b, :q + n] = torch.tensor(r["prompt_ids"] + r["response_ids"])
        source += range(b * T + q - 1, b * T + q + n - 1)  # the next-token shift: slot t-1 predicts token t
        targets += r["response_ids"]
        owner += [b] * n
    hidden = model.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state  # (B, T, D)
    hidden = hidden.reshape(-1, hidden.shape[-1])[torch.tensor(source, device=device)]  # (M, D)
    targets = torch.tensor(targets, device=device)
    head = model.get_output_embeddings()
    parts = [checkpoint(head_logprobs, head, hidden[s:s + head_rows], targets[s:s + head_rows], use_reentrant=False)
             for s in range(0, len(targets), head_rows)]
    logp, entropy = (torch.cat(p) for p in zip(*parts))
    return logp, entropy, torch.tensor(owner, device=device)


# --- optimizer step --------------------------------------------------------------------------------------------------
def autocast(args: argparse.Namespace, device: torch.device):
    """--dtype bfloat16 computes in it over float32 master weights; float32 is plain float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def make_optimizer(model, args: argparse.Namespace) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay,
                             fused=model.device.type == "cuda")


def total(value: float) -> float:
    """Sum of a number over all processes."""
    return sum(common.gather(value))


def apply_gradients(model, optimizer, grad_clip: float) -> float:
    """Sum gradients over processes, clip their norm, step. Returns the norm before clipping.

    Losses are divided by global token counts already, so gradients are summed and not averaged.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    common.barrier()  # says which process is missing, if one is; a collective does not
    for p in params:
        if p.grad is None:  # a rank without rows this step still takes part
            p.grad = torch.zeros_like(p)
        if common.world_size() > 1:
            dist.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip)
    if not norm.isfinite():  # on every process: from here on all weights would be nan
        raise UserError("the gradient is not finite: nothing was changed by this step; a lower --lr, or float32, may help")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


# --- data order and checkpoints --------------------------------------------------------------------------------------
def draw_rows(count: int, start: int, size: int, seed: int) -> list[int]:
    """Entries start..start+size-1 of the endless sequence of one permutation of range(count) per epoch."""
    perms = {}
    for epoch in range(start // count, (start + size - 1) // count + 1):
        generator = torch.Generator().manual_seed(rollout.row_key(seed, "epoch", epoch))
        perms[epoch] = torch.randperm(count, generator=generator).tolist()
    return [perms[i // count][i % count] for i in range(start, start + size)]


def save_checkpoint(out: Path, step: int, model, tokenizer, optimizer, state: dict, keep: int = 2) -> None:
    """OUT/checkpoint-STEP: model, optimizer and state as safetensors and JSON, written aside and renamed."""
    if common.rank() == 0:
        folder = out / f"checkpoint-{step:06d}"
        aside = out / "checkpoint.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        save_model(aside, model, tokenizer)
        names = [n for n, _ in model.named_parameters()]
        moments = {f"{names[i]}.{key}": value.contiguous() for i, s in optimizer.state_dict()["state"].items()
                   for key, value in s.items()}
        save_file(moments, aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps(state | {"step": step}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        for old in sorted(out.glob("checkpoint-*"))[:-keep]:
            shutil.rmtree(old)
    common.barrier()


def check_whole(folder: Path) -> None:
    """Raises UserError for a checkpoint that lacks a file or has a cut one. A kill leaves none: it is renamed when whole."""
    try:
        json.loads((folder / "state.json").read_text())["step"]
        for kind in ("model", "optimizer"):
            paths = list(folder.glob(f"{kind}*.safetensors"))
            for path in paths or [folder / f"{kind}.safetensors"]:
                safe_open(path, "pt").keys()  # compares the size of the file with its header
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise UserError(f"{folder}: damaged ({e}); remove it, and the run continues from the one before") from None


def load_checkpoint(out: Path, model, optimizer) -> dict:
    """Restore the last whole checkpoint into model and optimizer and cut metrics.jsonl back to it. {} if there is none."""
    folders = sorted(out.glob("checkpoint-*"))
    state = {"step": 0}
    if folders:
        check_whole(folders[-1])
        weights = load_file(folders[-1] / "model.safetensors", device=str(model.device))
        missing, unexpected = model.load_state_dict(weights, strict=False)
        tied = set(getattr(model, "_tied_weights_keys", None) or ())
        if unexpected or set(missing) - tied:
            raise UserError(f"{folders[-1]}: does not fit --model (missing {sorted(set(missing) - tied)[:3]}, "
                            f"unexpected {unexpected[:3]})")
        saved = load_file(folders[-1] / "optimizer.safetensors")  # load_state_dict moves what belongs on the device
        full = optimizer.state_dict()
        full["state"] = {i: {key: saved[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                         for i, (name, _) in enumerate(model.named_parameters()) if f"{name}.step" in saved}
        optimizer.load_state_dict(full)
        state = json.loads((folders[-1] / "state.json").read_text())
    if common.rank() == 0:
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (out / name).exists():
                rows = [r for r in common.read_jsonl(out / name, drop_torn=True) if r["step"] <= state["step"]]
                common.write_atomic(out / name, "".join(map(common.to_line, rows)))
    common.barrier()
    return state


def save_model(folder: Path, model, tokenizer) -> None:
    """A folder that from_pretrained loads. One file, so that a checkpoint is read back without an index."""
    model.save_pretrained(folder, max_shard_size="1TB")
    tokenizer.save_pretrained(folder)


def finish(out: Path, model, tokenizer) -> None:
    """OUT/model, written aside and renamed."""
    if common.rank() == 0:
        shutil.rmtree(out / "model.tmp", ignore_errors=True)
        save_model(out / "model.tmp", model, tokenizer)
        os.replace(out / "model.tmp", out / "model")
        trained(out)
    common.barrier()


def trained(out: Path) -> bool:
    """Whether OUT/model is there; if so its checkpoints, which a kill may have left behind, are removed."""
    done = (out / "model").exists()
    if done and common.rank() == 0:
        for folder in out.glob("checkpoint*"):
            shutil.rmtree(folder)
    return done


# --- flags -------------------------------------------------------------------------------------------------------------
def add_training_args(parser: argparse.ArgumentParser) -> None:
    """Flags that both trainers have."""
    parser.add_argument("--steps", type=int, default=100, help="[ours] optimizer steps in all")
    parser.add_argument("--lr", type=float, default=1e-5, help="[Table 7] constant learning rate of AdamW")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="[ours] the paper names none; VERL's default")
    parser.add_argument("--grad-clip", type=float, default=1.0, help="[Table 7] largest gradient norm")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384,
                        help="[ours] padded tokens per forward and backward: the memory flag of the update")
    parser.add_argument("--checkpoint-activations", action="store_true",
                        help="[ours] recompute activations in every backward: less memory for long rows, a third slower")
    parser.add_argument("--save-every", type=int, default=50, help="[ours] steps between checkpoints; 0 for none")


def check_training_args(args: argparse.Namespace) -> None:
    """Raises UserError naming the flag that is out of range."""
    for flag, good in {"steps": args.steps > 0, "batch_size": args.batch_size > 0, "lr": 0 <= args.lr < 1,
                       "weight_decay": args.weight_decay >= 0, "grad_clip": args.grad_clip > 0,
                       "micro_batch_tokens": args.micro_batch_tokens > 0, "save_every": args.save_every >= 0}.items():
        if not good:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is out of range")


FREE = ("device", "micro_batch_tokens", "checkpoint_activations", "save_every")  # these do not change a result in float32
