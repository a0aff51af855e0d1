"""What every stage shares, kept small and dull: errors, JSONL, run records, processes, models.

Nothing here knows about the method. There are no base classes, registries, callbacks or configuration files: a stage
calls these functions and stays a script that reads from top to bottom.
"""
import argparse
import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parent.parent  # where the stages are


class UserError(Exception):
    """Bad input. The message names the flag, or the file and line, to change; the script prints it and exits with 2."""


class LostProcess(Exception):
    """Another process is gone or hangs. The message names its rank; the script prints it and exits with 1."""


def printable(text: str) -> str:
    """Control characters as escapes: neither model output nor a data file may steer a terminal."""
    return "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode() for ch in text)


# --- flags -----------------------------------------------------------------------------------------------------------
class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help: the docstring as it is written, and every default."""


class Parser(argparse.ArgumentParser):
    """Flags of a script, whose docstring is its --help. Errors are one line; flags are not to be shortened."""

    def __init__(self, description: str, **more):
        super().__init__(description=description, formatter_class=Formatter, allow_abbrev=False, **more)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")


def checked(kind: type, good):
    """An argparse type: a number of this kind for which good(number) holds, and which is not nan."""
    def parse(text: str):
        value = kind(text)
        if not good(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value
    parse.__name__ = kind.__name__  # for argparse's own message: invalid int value
    return parse


# --- files -----------------------------------------------------------------------------------------------------------
def read_jsonl(path: str | Path, fields: tuple[str, ...] = (), drop_torn: bool = False) -> list[dict]:
    """Records of a JSONL file, one object a line.

    drop_torn=True forgets a last line without a newline, which is what a killed writer leaves behind.
    Raises UserError naming `path:line` for a missing file, a malformed line or a missing field.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    records = []
    for number, line in enumerate(lines[:-1] if drop_torn else lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}:{number}: not JSON ({e})") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
        for field in fields:
            if field not in record:
                raise UserError(f"{path}:{number}: no field {field!r}")
        records.append(record)
    return records


def to_line(record: dict) -> str:
    # Lone surrogates are legal in a str but not in UTF-8: ASCII escapes keep any text a model can produce writable.
    return json.dumps(record, ensure_ascii=True) + "\n"


def append_jsonl(path: str | Path, records: list[dict]) -> None:
    """Append in one write, so that a kill leaves whole lines and at most one torn one."""
    with open(path, "a", encoding="ascii") as f:
        f.write("".join(map(to_line, records)))


def write_atomic(path: str | Path, text: str) -> None:
    """Write aside and rename: a reader sees the old file or the new one, never half of it."""
    aside = Path(f"{path}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


class Place(NamedTuple):
    """Where a record is, which is read with read_at: a file may be larger than memory."""
    path: Path
    offset: int
    size: int  # bytes
    kept: object  # what scan() was told to keep of it


def scan(paths: list[Path], keep) -> dict[tuple[str, int], Place]:
    """Where each keyed record is: {(id, sample): its Place, with keep(record)}.

    Streams, so that files larger than memory will do. Raises UserError naming path:line for a malformed record.
    """
    found = {}
    for path in paths:
        offset = 0
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                try:
                    record = json.loads(line)
                    key = record["id"], record["sample"]
                    if key in found:
                        raise ValueError(f"sample {key[1]} of {key[0]!r} is there twice")
                    found[key] = Place(path, offset, len(line), keep(record))
                except KeyError as e:
                    raise UserError(f"{path}:{number}: no field {e}") from None
                except (ValueError, TypeError, RecursionError) as e:
                    raise UserError(f"{path}:{number}: not a record of this stage ({e!r})") from None
                offset += len(line)
    return found


def read_at(path: Path, offset: int, size: int) -> dict:
    """The record that scan() found there."""
    with open(path, "rb") as f:
        f.seek(offset)
        return json.loads(f.read(size))


def open_part(out: Path, name: str, keep) -> tuple[Path, dict]:
    """This rank's part file to append to, and scan() of what all ranks have finished so far, whoever they were."""
    part = out / f"{name}.rank{rank()}.part"
    if rank() == 0:
        for path in out.glob(f"{name}.rank*.part"):  # also those of ranks that this run does not have
            with open(path, "rb+") as f:
                whole = sum(len(line) for line in f if line.endswith(b"\n"))
                f.truncate(whole)  # a kill in mid-write leaves a torn last line
    barrier()
    done = scan(sorted(out.glob(f"{name}.rank*.part")), keep)
    barrier()  # nobody appends before everybody has read
    return part, done


def merge_parts(out: Path, name: str, order: dict[str, int], rewrite=iter) -> None:
    """Rank 0 joins the part files into out/name.jsonl, by order[id] and then by sample, and removes them. rewrite: a
    generator from the records in that order to those that are written."""
    barrier()
    if rank() == 0:
        index = scan(sorted(out.glob(f"{name}.rank*.part")), keep=lambda record: None)
        aside = out / f"{name}.jsonl.tmp"
        with open(aside, "w", encoding="ascii") as f:
            keys = sorted(index, key=lambda k: (order[k[0]], k[1]))
            f.writelines(map(to_line, rewrite(read_at(*index[key][:3]) for key in keys)))
        os.replace(aside, out / f"{name}.jsonl")
        remove_parts(out, name)
    barrier()


def remove_parts(out: Path, name: str) -> None:
    """Part files are of no use beside out/name.jsonl; a kill just after the merge leaves them behind."""
    for path in out.glob(f"{name}.rank*.part"):
        path.unlink(missing_ok=True)


def file_digest(path: str | Path) -> str:
    """A short hash of a file's content, to notice that the data of a run changed. Raises UserError if unreadable."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()[:16]
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None


def model_digest(folder: Path) -> str:
    """The same for a model: the end of every safetensors file stands for the whole, which may be large."""
    digest = hashlib.sha256()
    # chat templates and the files of slow tokenizers are in it too: they change prompts
    for path in sorted(p for kind in ("safetensors", "json", "jinja", "txt", "model")
                       for p in folder.glob(f"*.{kind}")):
        with open(path, "rb") as f:
            f.seek(max(0, path.stat().st_size - 2**20))
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + f.read())
    return digest.hexdigest()[:16]


def batches_by_length(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices in batches of at most max_tokens when padded (a single one may be longer), longest first, so that little
    of a batch is padding."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # the first of a batch is its longest, and so its padded length
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > max_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def start_run(out: str | Path, args: argparse.Namespace, free: tuple[str, ...] = (), **facts) -> Path:
    """Make the output folder and its run.json, or check that the folder was begun with the same settings. A folder with
    no more than a run.json has no result to protect: a command that failed can be corrected and run again.

    free: flags that may differ when a run continues, since they do not change its result but for rounding (batch size,
    device, ...).
    facts: anything else the result depends on (a digest of the data, say). Rank 0 writes; every rank checks.
    Raises UserError naming the first difference.
    """
    out = Path(out)
    settings = {k: v for k, v in sorted(vars(args).items()) if k not in free + ("out",)} | facts
    if isinstance(getattr(args, "model", None), str) and Path(args.model).is_dir():
        settings["model_digest"] = model_digest(Path(args.model))
    if getattr(args, "verifier", None) and verifier_path(args.verifier).is_file():
        settings["verifier_digest"] = file_digest(verifier_path(args.verifier))
    settings = json.loads(json.dumps(settings))  # tuples become lists, as they will be read back
    record = out / "run.json"
    if record.exists() and any(p.is_file() and not p.name.startswith("run.json") for p in out.rglob("*")):
        try:
            before = json.loads(record.read_text())["settings"].copy()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"--out {out}: its run.json is damaged, "
                            "so that nothing tells what the folder holds") from None
        for key in sorted((before.keys() | settings.keys()) - {*free}):  # a flag may have become free since
            if before.get(key) != settings.get(key):
                flag = "--" + key.replace("_", "-")
                raise UserError(f"--out {out} holds a run with {flag} {before.get(key)!r}, and this one asks for "
                                f"{settings.get(key)!r}: choose another --out, or the same settings to continue")
    elif rank() == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--out {out}: cannot be made ({e.strerror})") from None
        try:
            commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT,
                                    capture_output=True, text=True, check=False).stdout.strip()
        except OSError:  # a machine without git
            commit = ""
        import transformers
        write_atomic(record, json.dumps({
            "argv": sys.argv, "settings": settings, "git": commit or None, "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__, "processes": world_size(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, indent=1) + "\n")
    barrier()
    return out


# --- processes -------------------------------------------------------------------------------------------------------
store: dist.Store | None = None  # key-value store that the processes share, for Counter


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def patience() -> timedelta:
    """How long a process waits for the others before it gives up. It has to cover the time by which the slowest is
    behind at the end of a stage. Raises UserError naming the variable."""
    seconds = os.environ.get("LATENTREVISE_TIMEOUT", "7200")
    if not seconds.isdecimal() or not 0 < int(seconds) < 10**8:
        raise UserError(f"LATENTREVISE_TIMEOUT {seconds!r}: expected a number of seconds")
    return timedelta(seconds=int(seconds))


@functools.cache
def lines() -> list:
    """A group of rank 0 with each other rank, by rank. In one group of all, gloo closes every connection when one is
    lost, and then nobody can tell which; beside NCCL as well, whose errors name nobody."""
    return [None] + [dist.new_group([0, other], backend="gloo", timeout=patience()) for other in range(1, world_size())]


def barrier() -> None:
    """All processes meet. Raises LostProcess if one is gone or does not come in time; rank 0 knows which."""
    others = range(1, world_size()) if rank() == 0 else [rank()]
    for _ in range(2):  # the second round tells the others that rank 0 has met them all
        for other in others:
            try:
                dist.barrier(lines()[other])
            except RuntimeError:
                who = f"rank {other}" if rank() == 0 else "rank 0, or one that it waits for,"
                raise LostProcess(f"{who} is gone, or did not come within {patience().total_seconds():.0f} s") from None


def gather(value: object) -> list:
    """Every rank's value, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    barrier()  # an error there names the rank, one in the collective does not
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


class Counter:
    """A number that all processes of this run add to. Every rank makes the same ones in the same order."""
    numbers = itertools.count()

    def __init__(self):
        self.name, self.value = f"counter {next(self.numbers)}", 0

    def add(self, amount: int) -> int:
        """Returns the new value; each of several ranks that add 1 gets another. Raises LostProcess."""
        if world_size() > 1:
            try:
                return store.add(self.name, amount)
            except dist.DistError:  # torchrun holds the store; without it, rank 0 does
                raise LostProcess("rank 0, or torchrun, is gone") from None
        self.value += amount
        return self.value


def pick_device(args: argparse.Namespace) -> torch.device:
    """--device auto is this process's own GPU where there is one, else the CPU. Settles --dtype auto, which results
    depend on: call it before start_run. Raises UserError naming --device."""
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
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as e:
        raise UserError(f"--device {name}: cannot be used ({str(e).splitlines()[0]})") from None
    return device


def start_group() -> None:
    """The processes that torchrun started, on one node or several, or a group of this one alone."""
    global store
    if not dist.is_initialized():
        backend, wait = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo", patience()
        if "WORLD_SIZE" in os.environ:
            store, this, processes = next(dist.rendezvous("env://", timeout=wait))
            dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=this, world_size=processes,
                                    timeout=wait)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=wait)


def run_script(get_args, main) -> None:
    """Parse, start the process group if torchrun asked for one, run main(args), and end in one line and an exit code: 2
    for a UserError and for files that the system refuses, 1 for a LostProcess, 130 for Ctrl-C.
    The same command continues."""
    args = get_args()
    script, code = Path(sys.argv[0]).name, 0
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                start_group()
            except dist.DistError as e:
                reason = str(e).splitlines()[0]
                raise LostProcess(f"the others are gone, or did not come ({reason})") from None
            barrier()  # makes its groups while everybody is alive, so that a later loss is named
        main(args)
    except UserError as e:
        code, message = 2, f"error: {e}"
    except LostProcess as e:
        code, message = 1, f"rank {os.environ['RANK']} stops: {e}; the same command continues"
    except (OSError, SafetensorError) as e:  # a full disk, a read-only folder; safetensors has its own class
        code, message = 2, (f"error: {getattr(e, 'filename', None) or 'writing failed'}: "
                            f"{getattr(e, 'strerror', None) or e}")
    except KeyboardInterrupt:
        code, message = 130, "interrupted; the same command continues"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if code:
        print(f"{script}: {printable(message)}", file=sys.stderr)
        sys.exit(code)


# --- models ----------------------------------------------------------------------------------------------------------
def add_model_args(parser: argparse.ArgumentParser, several: bool = False) -> None:
    parser.add_argument("--model", required=True, nargs="+" if several else None,
                        help="[ours] Hugging Face causal LM: a folder or a hub id")
    parser.add_argument("--device", default="auto", help="[ours] auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="[ours] of all computation; auto: float32 on a CPU, bfloat16 on a GPU")


class Policy(NamedTuple):
    """A model and what is asked of it everywhere."""
    model: torch.nn.Module
    tokenizer: object
    vocab: int  # ids at or beyond it have embedding rows but no token
    eos: list[int]  # every id that ends a response
    context: float = float("inf")  # positions that it has, prompt and response together


def load_model(args: argparse.Namespace, device: torch.device, train: bool = False) -> Policy:
    """--model, ready to draw from.

    safetensors only, no remote code; dtype is given at construction, since `.to(bfloat16)` would round RoPE's
    frequencies. train=True gives float32 master weights, whatever --dtype. Raises UserError naming --model, also for an
    architecture that does more than embed, run its blocks and multiply by a head (scaled embeddings, capped logits).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = torch.float32 if train or args.dtype == "float32" else torch.bfloat16
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa",
                                                           use_safetensors=True, trust_remote_code=False,
                                                           output_loading_info=True)
    except Exception as e:  # noqa: BLE001 (damaged files raise anything: tokenizers has no narrower class)
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UserError(f"--model {args.model}: cannot be loaded ({reason})") from None
    if info["missing_keys"]:  # they would be random numbers, with no more than a warning
        raise UserError(f"--model {args.model}: its weights lack {sorted(info['missing_keys'])[:3]}")
    ids, rows = set(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if ids <= set(tokenizer.all_special_ids):  # what transformers makes of a Qwen folder without tokenizer files
        raise UserError(f"--model {args.model}: has no tokenizer")
    if max(ids) >= rows:  # its prompts would index beyond the embedding
        raise UserError(f"--model {args.model}: its tokenizer has ids up to {max(ids)}, and its embedding {rows} rows")
    model = model.to(device).eval()
    with torch.no_grad():
        some, embed = torch.arange(4, device=device)[None], model.get_input_embeddings()
        logits = model.get_output_embeddings()(model.base_model(some, use_cache=False).last_hidden_state)
        if logits.isnan().any():
            raise UserError(f"--model {args.model}: its logits are not numbers")
        plain = (torch.equal(embed(some), embed.weight[some])
                 and torch.allclose(model(some).logits, logits, rtol=1e-2, atol=1e-2))
    if not plain:
        raise UserError(f"--model {args.model}: {type(model).__name__} scales its embeddings or logits, "
                        "which is not supported")
    context = getattr(model.config, "max_position_embeddings", None) or float("inf")
    return Policy(model, tokenizer, max(ids) + 1, eos_ids(model, tokenizer), context)


@contextlib.contextmanager
def checkpointed(model, on: bool):
    """With `on`, blocks are computed again in the backward instead of keeping their activations. Transformers does so
    in training mode alone, so dropout is switched off by hand."""
    before = model.training
    if on:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
    try:
        yield
    finally:
        if on:
            model.activation_checkpointing_disable()
            model.train(before)


def eos_ids(model, tokenizer) -> list[int]:
    """Every id that ends a response: the generation config may list several. Raises UserError if there is none."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    found = sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
    if not found:
        raise UserError("--model has no end-of-sequence id in its generation_config or its tokenizer")
    return found


def verifier_path(spec: str) -> Path:
    """The file of `path.py:function`: where it says, or beside the stages."""
    path = Path(spec.rpartition(":")[0])
    return path if path.is_absolute() or path.exists() else ROOT / path


def load_verifier(spec: str):
    """The function of `path.py:function`, called as f(response, gold) -> bool. Raises UserError naming --verifier."""
    path, name = verifier_path(spec), spec.rpartition(":")[2]
    try:
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        if not callable(getattr(module, name)):
            raise TypeError(f"{name} is not a function")
    except (OSError, AttributeError, ImportError, SyntaxError, TypeError) as e:
        raise UserError(f"--verifier {spec}: expected path.py:function ({e})") from None
    return getattr(module, name)
