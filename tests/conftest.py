"""Small random models of the real architectures, and a tokenizer smaller than their embedding."""
import argparse
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Read at import: a missing folder is not looked for on the hub, and --device auto is the CPU on every machine
ENV = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
if os.environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2"):  # oneDNN too: PyTorch's bfloat16 attention asks it
    ENV["ONEDNN_MAX_CPU_ISA"] = "AVX2"  # whether the processor has AMX, and then lacks its own kernel for that
os.environ |= ENV

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

from processes import Group, run_stage

import rollout
from helpers import common, sampling

ROWS, TOKENS = 160, 150  # embedding rows, tokenizer ids: ids 150..159 have a row and no token
SHAPE = {"vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None,
         "eos_token_id": 1, "pad_token_id": 1}


def tiny_model(family: str, tied: bool = True, seed: int = 0):
    """A random model with attention that is far from uniform, so that a wrong mask or position shows."""
    extra = {"head_dim": 8} if family == "qwen3" else {}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **SHAPE, tie_word_embeddings=tied, initializer_range=0.15, **extra))
    model.set_attn_implementation("sdpa")
    return model.eval()


def tiny_tokenizer(chat: bool = True):
    """Every printable ASCII character is a token, ids 0..TOKENS-1; padding equals end-of-sequence.

    Bytes as Qwen2's BPE writes them, without merges: AutoTokenizer makes a Qwen2Tokenizer of it beside a Qwen2 model.
    """
    vocab = {"<unk>": 0, "<eos>": 1}
    for ch in ["\u010a", "\u0120", *map(chr, range(33, 127))]:  # line feed, space
        vocab[ch] = len(vocab)
    while len(vocab) < TOKENS:
        vocab[f"<extra{len(vocab)}>"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>",
                                   clean_up_tokenization_spaces=False)
    if chat:
        fast.chat_template = ("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
                              "{% if add_generation_prompt %}[assistant]{% endif %}")
    return fast


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A saved tiny Qwen2 with a chat tokenizer, as --model takes it."""
    return save(tmp_path_factory.mktemp("model") / "qwen2")


def save(path: Path, model=None, tokenizer=None) -> Path:
    """A model folder; without a model a tiny Qwen2."""
    (model or tiny_model("qwen2")).save_pretrained(path)
    (tokenizer or tiny_tokenizer()).save_pretrained(path)
    return path


class Shapes(TorchDispatchMode):
    """As a context: the shapes of all tensors that an operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {t.shape for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


# --- running stages ---------------------------------------------------------------------------------------------------
# Hits and misses from a random model. The last character is one that a continuation has, whatever its prefix
PARITY = "def verify(response, gold):\n    return len(response) % 2 == 1\n"
QUARTER = "def verify(response, gold):\n    return sum(map(ord, response[-1:])) % 4 == 1\n"
WRAPPER = ("Solve the following math problem step by step. The last line of your response should be of the form "
           "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your "
           "answer on its own line after \"Answer:\".")  # DAPO's


def write_problems(path: Path, count: int = 5) -> Path:
    path.write_text("".join(common.to_line({"id": f"p{i}", "problem": f"{i}+{i}?", "answer": str(2 * i)})
                            for i in range(count)))
    return path


def write_verifier(path: Path, text: str = PARITY) -> str:
    """A verifier file as --verifier takes it."""
    path.write_text(text)
    return f"{path}:verify"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if not k.startswith(("seconds", "tokens_per_second", "memory"))}
            for r in records]


def files(folder: Path) -> dict[str, bytes | list]:
    """Every file of a run but run.json, which has the time and the command; times are taken out of the metrics."""
    def content(p: Path) -> bytes | list:
        data = p.read_bytes()
        return without_seconds(read(p)) if p.name == "metrics.jsonl" and data.endswith(b"\n") else data
    return {str(p.relative_to(folder)): content(p) for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != "run.json"}


def assert_same_files(one: Path, other: Path) -> None:
    """Byte for byte but for times. Training and revision make batches of the same shapes after a restart."""
    a, b = files(one), files(other)
    assert a.keys() == b.keys() and not [name for name in a if a[name] != b[name]]


def args_for(tmp_path: Path, *extra: str) -> argparse.Namespace:
    return rollout.get_args(["--model", "m", "--data", "d", "--out", str(tmp_path), *extra])


def here(module: str, *args):
    """A stage, or another module that is a script, in this process; what its main() returns."""
    script = importlib.import_module(module)
    return script.main(script.get_args(list(map(str, args))))


def run(script: str, *args, processes: int = 1, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """A stage, or a module, as a user runs it, through python or torchrun: seconds of imports every time.
    env: more variables."""
    launcher = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    what = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    result = subprocess.run(
        [*launcher, *what, *map(str, args)], capture_output=True, text=True, timeout=300, check=False,
        cwd=None if script.endswith(".py") else ROOT, env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"} | ENV | env)
    assert not check or result.returncode == 0, result.stderr
    return result


def parsed(command: str) -> tuple[str, argparse.Namespace]:
    """A command of experiments/: its script, and its arguments as the script's own parser takes them."""
    script, *argv = shlex.split(command.removeprefix("-m "))
    return script, importlib.import_module(script.removesuffix(".py")).get_args(argv)


def note_draws(path: str):
    """In the child: note every draw; returns the function that writes {key: [[time, [token, distance of the uniform to
    the nearer end of the token's stretch of the CDF], ...], ...]}, a list for each time that the row was drawn."""
    rows, now, draw, uniforms = {}, [], sampling.draw, sampling.uniforms

    def noting_uniforms(keys, position):
        now[:] = keys.tolist(), position.tolist()
        return uniforms(keys, position)

    def noting_draw(logits, u, temperature, top_k, top_p):
        tokens, logprobs = draw(logits, u, temperature, top_k, top_p)
        cdf = torch.nn.functional.pad(logits.double().softmax(-1).cumsum(-1), (1, 0))  # temperature 1, no filters
        ends = cdf.gather(1, tokens[:, None] + torch.tensor([[0, 1]]))  # (B, 2)
        for key, t, token, distance in zip(*now, tokens.tolist(), (ends - u[:, None]).abs().amin(-1).tolist()):
            if t == 0:  # an evaluation draws its rows again and again, in whatever process
                rows.setdefault(key, []).append([time.time()])
            rows[key][-1].append([token, distance])
        return tokens, logprobs

    sampling.draw, sampling.uniforms = noting_draw, noting_uniforms
    return lambda: Path(path).write_text(json.dumps(rows))


def stage(script: str, *args, processes: int = 1, kill_at: int = 0, check: bool = True,
          draws: Path | None = None) -> subprocess.CompletedProcess:
    """A stage in processes of its own, quickly. kill_at: see die_at (check must then expect -SIGKILL).
    draws: prefix of the files that get every draw, for `same_draws`."""
    argv = list(map(str, args))
    with tempfile.TemporaryDirectory() as folder:
        group = Group(processes, folder, run_stage, script, argv, kill_at, str(draws or ""))
        codes = group.finish()
        out, err = group.said(1)[0], "".join(group.said(2))
    code = next((c for c in codes if c != 0), 0)
    expected = -signal.SIGKILL if kill_at else 0
    assert not check or code == expected, f"exit {code}\n{err}"
    return subprocess.CompletedProcess([script, *argv], code, out, err)


STAGES = ["rollout", "revise", "train_sft", "train_grpo", "eval"]
SAMPLERS = ["rollout", "revise", "train_grpo", "eval"]
READERS = ["rollout", "train_grpo", "eval"]  # of problems


class Trap:
    """Pickled code that leaves a file behind when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Desk:
    """Good inputs for every stage, to spoil one at a time."""

    def __init__(self, path, model_dir, monkeypatch, capsys):
        self.path, self.out, self.monkeypatch, self.capsys = path, path / "out", monkeypatch, capsys
        self.data = write_problems(path / "d.jsonl", 3)
        self.rollouts = path / "rollouts"
        self.rollouts.mkdir()
        self.write_rollouts()
        self.rows = path / "rows.jsonl"
        self.rows.write_text(json.dumps({"prompt_ids": [5, 6], "response_ids": [7, 1]}) + "\n")
        shared = {"--model": model_dir, "--out": self.out, "--device": "cpu"}
        sampling = {"--verifier": write_verifier(path / "v.py"), "--max-new-tokens": 12}
        self.flags = {
            "rollout": shared | sampling | {"--data": self.data, "-n": 2},
            "revise": shared | sampling | {"--rollouts": self.rollouts, "--continuations": 2},
            "train_sft": shared | {"--data": self.rows, "--steps": 1, "--batch-size": 1},
            "train_grpo": shared | sampling | {"--data": self.data, "--steps": 1, "--batch-size": 1,
                                               "--group-size": 2, "--revise": None},
            "eval": shared | sampling | {"--data": self.data, "-n": 2, "--k": 1}}

    def write_rollouts(self, **changes):
        self.rollouts.joinpath("rollouts.jsonl").write_text("".join(json.dumps(
            {"id": f"p{i}", "sample": 0, "prompt_ids": [5, 6], "response_ids": [7] * 10, "response": "x",
             "finish": "length", "reward": 0, "answer": str(i)} | changes) + "\n" for i in range(2)))

    def run(self, name, changes):
        """Run a stage in this process: exit code, stderr."""
        argv = []
        for flag, value in (self.flags[name] | changes).items():
            argv += [flag, *map(str, value if isinstance(value, list) else [] if value is None else [value])]
        module = importlib.import_module(name)
        self.monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
        self.capsys.readouterr()
        try:
            common.run_script(module.get_args, module.main)
        except SystemExit as e:
            return e.code, self.capsys.readouterr().err
        return 0, self.capsys.readouterr().err

    def fails(self, name, message, changes=None):
        """Exactly one line, the right code, and an output folder that holds no more than before."""
        before = self.tree()
        code, err = self.run(name, changes or {})
        assert code == 2, err
        assert re.fullmatch(rf"{name}\.py: error: .*{message}.*\n", err), err
        assert self.tree() == before
        return err

    def tree(self):
        """Every file under the output folder; a run.json alone does not count, the next command may replace it."""
        files = [p for p in self.out.rglob("*") if p.is_file()] if self.out.is_dir() else []
        return {p: p.read_bytes() for p in files} if any(p.name != "run.json" for p in files) else {}


@pytest.fixture
def desk(tmp_path, model_dir, monkeypatch, capsys):
    return Desk(tmp_path, model_dir, monkeypatch, capsys)


# --- drawn text, which is the same up to float32 rounding -------------------------------------------------------------
# Another batch shape rounds logits in another way, and a uniform that lies on a boundary of the CDF then falls on its
# other side: about one token in ten million. These functions allow that and nothing else.
NEAR = 1e-6  # of a uniform to a boundary of the CDF
NEAR_LOGITS = 1e-5  # of two logits, where the larger is taken (temperature 0)


@torch.no_grad()
def common_tokens(model, prompt, key, one: list[int], other: list[int], vocab: int = TOKENS, temperature: float = 1,
                  where: object = "") -> int:
    """How many tokens two decodes of one row have in common: all, or those before a difference that rounding explains.
    prompt: token ids or embeddings. Raises AssertionError where a float64 model says that it does not."""
    if one == other:
        return len(one)
    row = f"row {where or key}"
    t = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), None)
    assert t is not None, f"{row}: one decode is the beginning of the other, {len(one)} and {len(other)} tokens"
    with torch.random.fork_rng():
        exact = type(model)(model.config).double().eval()  # not a deepcopy: tests replace `forward`
    exact.load_state_dict(model.state_dict())
    prompt, embed = torch.as_tensor(prompt).cpu(), exact.get_input_embeddings()
    x = torch.cat([prompt.double() if prompt.is_floating_point() else embed(prompt),
                   embed(torch.tensor(one[:t], dtype=torch.long))])  # (T, D)
    logits = exact(inputs_embeds=x[None], use_cache=False).logits[0, -1, :vocab].double()
    low, high = sorted((one[t], other[t]))
    assert high < vocab, f"{row}, position {t}: token {high} is beyond the vocabulary"
    if temperature == 0:
        distance, near = float(logits.max() - logits[[low, high]].min()), NEAR_LOGITS
    else:
        cdf = (logits / temperature).softmax(-1).cumsum(-1)[[low, high - 1]]  # first and last boundary between the two
        u = float(sampling.uniforms(torch.tensor([key]), t))
        distance, near = float((cdf - u).abs().max()), NEAR
    assert distance < near, (f"{row}, position {t}: tokens {one[t]} and {other[t]} at a distance of {distance:.1e}, "
                             f"and rounding explains {near:.0e}")
    return t


def assert_same_texts(model, prompts, keys, ones, others, **how) -> None:
    """Rows of every prompt, as `sampling.sample` returns them, from two decodes; log-probabilities are compared up to
    the first difference."""
    assert len(prompts) == len(keys) == len(ones) == len(others)
    for i, (prompt, ks, xs, ys) in enumerate(zip(prompts, keys, ones, others)):
        assert len(ks) == len(xs) == len(ys)
        for s, (key, x, y) in enumerate(zip(ks, xs, ys)):
            n = common_tokens(model, prompt, key, x.ids, y.ids, where=(i, s), **how)
            assert x.logprobs[:n] == pytest.approx(y.logprobs[:n], abs=1e-4), (i, s)
            assert x.ids != y.ids or x.finish == y.finish, (i, s)


def same_rollouts(one: Path, other: Path) -> bool:
    """Whether two rollouts.jsonl are the same byte for byte. Where not, a record may differ in its response and what
    follows from it, from a token on that rounding explains; else raises AssertionError."""
    if one.read_bytes() == other.read_bytes():
        return True
    args = argparse.Namespace(**json.loads((one.parent / "run.json").read_text())["settings"])
    assert (args.top_k, args.top_p) == (0, 1)  # else the CDF is another one
    model, _, vocab, *_ = common.load_model(args, torch.device("cpu"))
    ones, others = read(one), read(other)
    assert [(r["id"], r["sample"]) for r in ones] == [(r["id"], r["sample"]) for r in others]
    for a, b in zip(ones, others):
        if a["response_ids"] == b["response_ids"]:
            assert a == b
            continue
        assert a.keys() == b.keys() and all(a[k] == b[k] for k in ("prompt_ids", "answer"))
        key = sampling.row_key(args.seed, a["id"], a["sample"])
        common_tokens(model, a["prompt_ids"], key, a["response_ids"], b["response_ids"], vocab, args.temperature,
                      (a["id"], a["sample"]))
    return False


def assert_same_sampling(one: Path, other: Path, again) -> None:
    """Two folders of rollout.py or eval.py: the same files, byte for byte if what was drawn is. Otherwise what the
    stage makes of its own draws: again() runs it once more on `other`, where nothing is left to sample."""
    before = files(other)
    assert before.keys() == files(one).keys()
    drawn = [name for name in before if Path(name).name == "rollouts.jsonl"]
    assert drawn
    equal = [same_rollouts(one / name, other / name) for name in drawn]  # each is compared, whatever the first one says
    if all(equal):
        assert_same_files(one, other)
        return
    for name in before.keys() - {*drawn}:
        (other / name).unlink()
    again()
    assert files(other) == before


TRAINED = 1e-5  # NEAR where two runs' weights differ in the last digits too


def same_draws(one: Path, other: Path) -> bool:
    """Whether two training runs with stage(draws=...) drew the same. Raises AssertionError for a first difference that
    rounding does not explain. Weights change from step to step, so each run's own CDF stands for the float64 one: a
    wrong mask, position or key changes the token wherever the uniform lies."""
    noted = [{}, {}]
    for rows, run in zip(noted, (one, other)):
        for path in run.parent.glob(f"{run.name}.draws*"):
            for key, drawn in json.loads(path.read_text()).items():
                rows[key] = sorted(rows.get(key, []) + drawn)
    flipped = False
    for key in noted[0].keys() & noted[1].keys():
        pairs = (pair for x, y in zip(noted[0][key], noted[1][key]) for pair in enumerate(zip(x[1:], y[1:])))
        for t, ((a, near_a), (b, near_b)) in pairs:
            if a != b:
                assert min(near_a, near_b) < TRAINED, (
                    f"row {key}, position {t}: tokens {a} and {b} at {near_a:.1e} and {near_b:.1e}")
                flipped = True
                break
    assert noted[0] and (flipped or noted[0].keys() == noted[1].keys())
    return not flipped
