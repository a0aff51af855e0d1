"""What every stage shares: errors, flags, JSONL, run records, processes, models. Nothing here knows
about the method."""
import argparse
import contextlib
import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from helpers import verifying


class UserError(Exception):
    """Bad input. The message names the flag, or the file and line, to change. Exit code 2."""


class LostProcess(Exception):
    """Another process is gone or hangs. The message names its rank, if known. Exit code 1."""


def printable(text: str) -> str:
    """Control characters as escapes: no output of a model and no data file may steer a terminal."""
    return "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode() for ch in text)


# --- flags ----------------------------------------------------------------------------------------
class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help: the docstring as it is written, and every default that there is."""

    def _get_help_string(self, action: argparse.Action) -> str:
        none = action.default is None or action.default is False
        return action.help if none else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Flags of a script, whose docstring is its --help. Errors are one line; no abbreviations."""

    def __init__(self, description: str, **more):
        super().__init__(description=description, formatter_class=Formatter, allow_abbrev=False,
                         **more)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")


def checked(kind: type, good):
    """An argparse type: a number of this kind for which good(number) holds; nan never does."""
    def parse(text: str):
        value = kind(text)
        if not good(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value
    parse.__name__ = kind.__name__  # for argparse's own message: invalid int value
    return parse


POSITIVE, COUNT = checked(int, lambda n: n > 0), checked(int, lambda n: n >= 0)
NOT_NEGATIVE = checked(float, lambda x: x >= 0)


# --- JSONL files ----------------------------------------------------------------------------------
class Place(NamedTuple):
    """Where a record is: a file may be larger than memory."""
    path: Path
    offset: int
    size: int  # bytes
    kept: object = None  # what scan() was told to keep of the record

    def read(self) -> dict:
        with open(self.path, "rb") as f:
            f.seek(self.offset)
            return json.loads(f.read(self.size))


def records_of(path: str | Path, fields=()) -> Iterator[tuple[int, Place, dict]]:
    """Line number, place and record of every line that is not blank, one JSON object each.
    Raises UserError naming `path:line` for a malformed line or a missing field."""
    offset = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            place, offset = Place(path, offset, len(line)), offset + len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path}:{number}: not JSON ({e})") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, not {record!r:.40}")
            for field in fields:
                if field not in record:
                    raise UserError(f"{path}:{number}: no field {field!r}")
            yield number, place, record


def read_jsonl(path: str | Path, fields=()) -> list[dict]:
    """The records of a JSONL file, as records_of finds them."""
    return [record for _, _, record in records_of(path, fields)]


def scan(paths: list[Path], keep=lambda record: None) -> dict[tuple[str, int], Place]:
    """Where each record is: {(id, sample): its Place, with keep(record)}. Raises UserError naming
    `path:line` for a malformed record, or one that is there twice."""
    found = {}
    for path in paths:
        for number, place, record in records_of(path, ("id", "sample")):
            key = record["id"], record["sample"]
            try:
                if key in found:
                    raise ValueError(f"sample {key[1]} of {key[0]!r} is there twice")
                found[key] = place._replace(kept=keep(record))
            except KeyError as e:
                raise UserError(f"{path}:{number}: no field {e}") from None
            except (ValueError, TypeError) as e:
                raise UserError(f"{path}:{number}: not a record of this stage ({e!r})") from None
    return found


def to_line(record: dict) -> str:
    # Lone surrogates are legal in a str but not in UTF-8; in ASCII any text can be written
    return json.dumps(record, ensure_ascii=True) + "\n"


def append_jsonl(path: str | Path, records: list[dict]) -> None:
    """Append in one write, so that a kill leaves whole lines and at most one torn one."""
    with open(path, "a", encoding="ascii") as f:
        f.write("".join(map(to_line, records)))


def cut_torn_line(path: Path) -> None:
    """What a kill in mid-write leaves: a last line without a newline."""
    with open(path, "rb+") as f:
        f.truncate(sum(len(line) for line in f if line.endswith(b"\n")))


def write_atomic(path: str | Path, lines: Iterable[str]) -> None:
    """Write aside and rename: a reader sees the old file or the new one, never half of it.
    lines: may be more than memory holds; a text will do."""
    aside = Path(f"{path}.tmp")
    with open(aside, "w", encoding="utf-8") as f:
        f.writelines(lines)
    os.replace(aside, path)


# --- part files: what each rank has finished, until all is done -----------------------------------
def part_files(out: Path, name: str) -> list[Path]:
    return sorted(out.glob(f"{name}.rank*.part"))  # also those of ranks that this run does not have


def open_part(out: Path, name: str,
              keep=lambda record: None) -> tuple[Path, dict[tuple[str, int], Place]]:
    """The file that this rank appends to, and scan() of what all ranks have finished so far."""
    if rank() == 0:
        for path in part_files(out, name):
            cut_torn_line(path)
    barrier()
    done = scan(part_files(out, name), keep)
    barrier()  # nobody appends before everybody has read
    return out / f"{name}.rank{rank()}.part", done


def merge_parts(out: Path, name: str, order: dict[str, int]) -> None:
    """Rank 0 joins the part files into out/name.jsonl, by order[id] and then by sample."""
    barrier()
    if rank() == 0:
        places = scan(part_files(out, name))
        keys = sorted(places, key=lambda key: (order[key[0]], key[1]))
        write_atomic(out / f"{name}.jsonl", (to_line(places[key].read()) for key in keys))
        remove_parts(out, name)
    barrier()


def remove_parts(out: Path, name: str) -> None:
    """Part files are of no use beside out/name.jsonl; a kill after the merge leaves them there."""
    for path in part_files(out, name):
        path.unlink(missing_ok=True)


# --- run records ----------------------------------------------------------------------------------
def file_digest(path: str | Path) -> str:
    """A short hash of a file's content."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def model_digest(folder: Path) -> str:
    """The same of a model, its tokenizer and chat template: of each file's last MB and size, since
    weights are large."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (
            ".safetensors", ".json", ".jinja", ".txt", ".model")
            and not p.name.startswith(("optimizer-", "state.", "run."))):  # these may come and go
        with open(path, "rb") as f:
            f.seek(max(0, path.stat().st_size - 2**20))
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + f.read())
    return digest.hexdigest()[:16]


# Flags that may differ when a run continues: rounding alone (--steps: constant learning rate)
FREE = {"device", "decode_rows", "decode_tokens", "revise_tokens", "train_tokens", "shard", "steps",
        "checkpoint_activations", "save_every", "keep", "samples", "log_to"}


def start_run(out: str | Path, args: argparse.Namespace, free=(), **facts) -> Path:
    """Make the output folder and its run.json, or check that it was begun with the same settings.
    Raises UserError naming the first difference. A folder with no more than a run.json has no
    result to protect: a command that failed can be corrected and run again.

    free: further flags that may differ. facts: what else the result depends on, such as the data.
    """
    out, free = Path(out), {*FREE, *free}
    settings = {k: v for k, v in sorted(vars(args).items()) if k not in free | {"out"}} | facts
    if isinstance(getattr(args, "model", None), str) and Path(args.model).is_dir():
        settings["model_digest"] = model_digest(Path(args.model))
    if getattr(args, "verifier", None) and verifying.file_of(args.verifier).is_file():
        settings["verifier_digest"] = file_digest(verifying.file_of(args.verifier))
    settings = json.loads(json.dumps(settings))  # tuples become lists, as they will be read back
    record = out / "run.json"
    results = (p for p in out.rglob("*") if p.is_file() and not p.name.startswith("run.json"))
    if any(results if record.exists() else out.glob("*.jsonl")):
        try:
            before = json.loads(record.read_text())["settings"].copy()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"--out {out}: its run.json is damaged or gone") from None
        for key in sorted((before.keys() | settings.keys()) - free):  # it may be free since then
            if before.get(key) != settings.get(key):
                flag = "--" + key.replace("_", "-")
                raise UserError(f"--out {out} holds a run with {flag} {before.get(key)!r}, and "
                                f"this one asks for {settings.get(key)!r}: choose another --out, "
                                "or the same settings to continue")
    elif rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(record, json.dumps({
            "argv": sys.argv, "settings": settings, "git": git_commit(),
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": version("transformers"), "processes": world_size(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, indent=1) + "\n")
    barrier()
    return out


def git_commit() -> str | None:
    """Of the stages; None outside of a repository and on a machine without git."""
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=verifying.ROOT,
                              capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None


# --- processes ------------------------------------------------------------------------------------
store: dist.Store | None = None  # key-value store that the processes share, for Counter


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def process_timeout() -> timedelta:
    """How long a process waits for another; at the end of a stage, for the slowest of all."""
    seconds = os.environ.get("LATENTREVISE_TIMEOUT", "7200")
    if not seconds.isdecimal() or not 0 < int(seconds) < 10**8:
        raise UserError(f"LATENTREVISE_TIMEOUT {seconds!r}: expected a number of seconds")
    return timedelta(seconds=int(seconds))


def start_group() -> None:
    """Join the processes that torchrun started, or make a group of this one. Raises LostProcess."""
    global store
    if dist.is_initialized():
        return
    backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
    this, count, wait = 0, 1, process_timeout()
    try:
        if "WORLD_SIZE" in os.environ:
            store, this, count = next(dist.rendezvous("env://", timeout=wait))
        own = dist.PrefixStore("group", store) if store else dist.HashStore()
        dist.init_process_group(backend, store=own, rank=this, world_size=count, timeout=wait)
    except dist.DistError as e:
        reason = str(e).splitlines()[0]
        raise LostProcess(f"the others are gone, or did not come ({reason})") from None


def barrier() -> None:
    """All processes meet at rank 0. Raises LostProcess if one is gone or does not come in time.

    A note goes between two processes at a time, so that rank 0 knows who is missing: a collective
    does not say, nor does monitored_barrier of a process that died before rank 0 came. Notes are
    on the CPU: gloo carries them beside NCCL.
    """
    others, note = range(1, world_size()) if rank() == 0 else [0], torch.zeros(1)
    for pass_note in (dist.recv, dist.send) if rank() == 0 else (dist.send, dist.recv):
        for other in others:
            try:
                pass_note(note, other)
            except RuntimeError:
                who = f"rank {other}" if rank() == 0 else "rank 0, or one that it waits for,"
                raise LostProcess(f"{who} is gone, or did not come within "
                                  f"{process_timeout().total_seconds():.0f} s") from None


def gather(value: object) -> list:
    """Every rank's value, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    barrier()  # says who is missing; the collective does not
    values = [None] * world_size()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as e:
        raise LostProcess(f"one of the others is gone ({str(e).splitlines()[0]})") from None
    return values


class Counter:
    """A number that all processes add to. Every rank makes the same ones in the same order."""
    numbers = itertools.count()

    def __init__(self):
        self.name, self.value = f"counter {next(self.numbers)}", 0

    def add(self, amount: int) -> int:
        """The new value: each of several ranks that add 1 gets another."""
        if world_size() > 1:
            try:
                return store.add(self.name, amount)
            except dist.DistError:  # torchrun holds the store; without it, rank 0 does
                raise LostProcess("rank 0, or torchrun, is gone") from None
        self.value += amount
        return self.value


def run_script(get_args, main) -> None:
    """Parse, join the other processes if torchrun started some, run main(args). Ends in one line
    and an exit code: 2 for a UserError and for files that the system refuses, 1 for a LostProcess,
    130 for Ctrl-C."""
    args = get_args()
    code = 0
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            start_group()
            barrier()  # all are there: a rank that finds bad input at once is not taken for lost
        main(args)
    except UserError as e:
        code, message = 2, f"error: {e}"
    except LostProcess as e:
        code, message = 1, f"rank {os.environ['RANK']} stops: {e}; the same command continues"
    except (OSError, SafetensorError) as e:  # a full disk, say; safetensors has a class of its own
        file, reason = getattr(e, "filename", None), getattr(e, "strerror", None)
        code, message = 2, f"error: {file or 'writing failed'}: {reason or e}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted; the same command continues"
    finally:
        verifying.close_all()
        if dist.is_initialized():
            dist.destroy_process_group()
    if code:
        print(f"{Path(sys.argv[0]).name}: {printable(message)}", file=sys.stderr)
        sys.exit(code)


# --- models ---------------------------------------------------------------------------------------
def add_model_args(parser: argparse.ArgumentParser, several: bool = False) -> None:
    add = parser.add_argument
    add("--model", required=True, nargs="+" if several else None,
        help="Hugging Face causal LM: a folder or a hub id")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
        help="of all computation; auto: float32 on a CPU, bfloat16 on a GPU")


def pick_device(args: argparse.Namespace) -> torch.device:
    """--device; auto is this process's own GPU where there is one. Settles --dtype auto, which
    results depend on: call it before start_run. Raises UserError."""
    name = args.device
    if name == "cuda" or name == "auto" and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    name = "cpu" if name == "auto" else name
    if args.dtype == "auto":
        args.dtype = "bfloat16" if name.startswith("cuda") else "float32"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, ValueError) as e:
        raise UserError(f"--device {name}: cannot be used ({str(e).splitlines()[0]})") from None
    return device


class Policy(NamedTuple):
    """A model and what is asked of it everywhere."""
    model: torch.nn.Module
    tokenizer: object
    vocab: int  # ids at or beyond it have embedding rows but no token
    eos: list[int]  # every id that ends a response
    context: float = float("inf")  # positions that it has, prompt and response together


def load_model(args: argparse.Namespace, device: torch.device, train: bool = False) -> Policy:
    """--model, ready to draw from: safetensors only, no remote code. train: float32 master weights,
    whatever --dtype. Raises UserError, also for a model that does more than embed, run its blocks
    and multiply by a head (scaled embeddings, capped logits)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = torch.float32 if train or args.dtype == "float32" else torch.bfloat16
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        # dtype at construction: `.to(bfloat16)` would round the frequencies of RoPE
        model, info = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=dtype, attn_implementation="sdpa", use_safetensors=True,
            trust_remote_code=False, output_loading_info=True)
    except Exception as e:  # noqa: BLE001 (damaged files raise anything)
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UserError(f"--model {args.model}: cannot be loaded ({reason})") from None
    if info["missing_keys"]:  # they would be random numbers, with no more than a warning
        missing = sorted(info["missing_keys"])[:3]
        raise UserError(f"--model {args.model}: its weights lack {missing}")
    ids, embed = set(tokenizer.get_vocab().values()), model.get_input_embeddings()
    rows = embed.num_embeddings
    if ids <= set(tokenizer.all_special_ids):  # what a Qwen folder without tokenizer files gives
        raise UserError(f"--model {args.model}: has no tokenizer")
    if max(ids) >= rows:  # its prompts would index beyond the embedding
        raise UserError(f"--model {args.model}: its tokenizer has ids up to {max(ids)}, and its "
                        f"embedding {rows} rows")
    model = model.to(device).eval()
    with torch.no_grad():
        some = torch.arange(4, device=device)[None]  # (1, 4)
        hidden = model.base_model(some, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden)
        plain = (torch.equal(embed(some), embed.weight[some])
                 and torch.allclose(model(some).logits, logits, rtol=1e-2, atol=1e-2))
    if logits.isnan().any():
        raise UserError(f"--model {args.model}: its logits are not numbers")
    if not plain:
        raise UserError(f"--model {args.model}: {type(model).__name__} scales its embeddings or "
                        "logits, which is not supported")
    context = getattr(model.config, "max_position_embeddings", None) or float("inf")
    return Policy(model, tokenizer, max(ids) + 1, eos_ids(model, tokenizer), context)


def eos_ids(model, tokenizer) -> list[int]:
    """Every id that ends a response: a generation config may list several. Raises UserError."""
    ids = model.generation_config.eos_token_id
    turn = tokenizer.get_vocab().get("<|im_end|>")  # Qwen's base models do not list it
    found = {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id, turn} - {None}
    if not found:
        raise UserError(f"--model {model.name_or_path}: no end-of-sequence id in its "
                        "generation_config or tokenizer")
    return sorted(found)


@contextlib.contextmanager
def checkpointed(model, on: bool):
    """With `on`, blocks are computed again in the backward instead of keeping their activations.
    Transformers does so where a block is in training mode; what is in it is not: no dropout."""
    before = model.training
    if on:
        model.activation_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            module.training = getattr(module, "gradient_checkpointing", False)
    try:
        yield
    finally:
        if on:
            model.activation_checkpointing_disable()
            model.train(before)


def batches_by_length(items: list, length, max_tokens: int) -> list[list]:
    """Items in batches of at most max_tokens when padded, longest first: little is padding.
    A single one may be longer. length: a function of an item."""
    batches, longest = [], 0
    for item in sorted(items, key=length, reverse=True):
        if not batches or (len(batches[-1]) + 1) * longest > max_tokens:
            batches.append([])
            longest = length(item)  # the first of a batch is its longest, and so its padded length
        batches[-1].append(item)
    return batches
