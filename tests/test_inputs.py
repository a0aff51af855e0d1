"""Bad input ends in one line that names the file and line or the flag, with exit code 2 and nothing lost."""
import json
import re
from argparse import Namespace

import pytest
import torch
from conftest import (
    READERS,
    SAMPLERS,
    SHAPE,
    STAGES,
    Trap,
    run,
    save,
    stage,
    tiny_model,
    tiny_tokenizer,
    write_verifier,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import rollout
from helpers import common
from helpers.common import UserError

# --- problems ---------------------------------------------------------------------------------------------------------
GOOD = b'{"id": "a", "problem": "1+1?", "answer": "2"}\n'


def row(**changes):
    return (json.dumps({"id": "b", "problem": "1+2?", "answer": "3"} | changes) + "\n").encode()


BAD_PROBLEMS = {
    "malformed": (b'{"id": 1,\n', r"d\.jsonl:2: not JSON"), "truncated": (row()[:-5], r"d\.jsonl:2: not JSON"),
    "bytes": (b'{"id": "\xff\xfe"}\n', r"d\.jsonl:2: not JSON"),
    **{text: (f"{text}\n".encode(), r"d\.jsonl:2: expected a JSON object") for text in ("[1]", '"x"', "null")},
    "deep": (b"[" * 100_000 + b"\n", r"d\.jsonl:2: not JSON"),
    "no-problem": (b'{"id": "b", "answer": "3"}\n', r"d\.jsonl:2: no field 'problem'"),
    "no-answer": (b'{"id": "b", "problem": "x"}\n', r"d\.jsonl:2: no field 'answer'"),
    "same-id": (row(id="a"), r"d\.jsonl: record 2: id 'a' was used by record 1"),
    "null-id": (row(id=None) + row(id="2"), r"d\.jsonl: record 3: id '2' was used by record 2"),
    **{f"answer-{v!r}": (row(answer=v), r"d\.jsonl: record 2: 'answer' is not a string or a number")
       for v in (None, float("nan"), float("inf"))},  # others are a matter of the verifier: test_rollout.py
    "answer-empty": (row(answer=" "), r"d\.jsonl: record 2: empty"),
    "problem-empty": (row(problem=""), r"d\.jsonl: record 2: empty"),
    **{f"problem-{v!r}": (row(problem=v), r"d\.jsonl: record 2: .*neither a string nor a list of chat messages")
       for v in (None, 5, [], ["x"], [{"role": "user"}], [{"role": "user", "content": 3}], {})},
    "surrogate": (row(problem="a\ud800"), "refused by the tokenizer"),
    "long": (row(problem="x" * 600), r"problem 'b' is \d+ tokens long"),
}


@pytest.mark.parametrize("case", BAD_PROBLEMS)
@pytest.mark.parametrize("name", READERS)
def test_bad_problems(desk, name, case):
    text, message = BAD_PROBLEMS[case]
    desk.data.write_bytes(GOOD + text)
    desk.fails(name, message)


@pytest.mark.parametrize("name", [*READERS, "train_sft"])
def test_missing_and_empty_data(desk, name):
    desk.fails(name, r"nope\.jsonl: No such file", {"--data": desk.path / "nope.jsonl"})
    desk.fails(name, "Is a directory", {"--data": desk.path})
    empty = desk.path / "empty.jsonl"
    empty.write_text("\n\n")
    desk.fails(name, r"empty\.jsonl.*no (problems|rows)", {"--data": empty})


# --- models -----------------------------------------------------------------------------------------------------------
def spoil(kind, path):
    """A copy of a good model folder with one thing wrong."""
    if kind == "missing":
        return
    path.mkdir()
    if kind == "empty":
        return
    model, tokenizer = tiny_model("qwen2", tied=False), tiny_tokenizer()
    weights, config = path / "model.safetensors", path / "config.json"
    if kind == "a weight that is nan":
        model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    if kind == "a larger tokenizer":
        tokenizer.add_tokens([f"<more{i}>" for i in range(11)])  # ids 150 to 160, of 160 rows
    if kind == "no end":
        model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token = None
    save(path, model, tokenizer)
    if kind == "without tokenizer":
        for file in path.glob("*token*"):
            file.unlink()
    if kind in ("no weights", "pickled weights"):
        weights.unlink()
    if kind == "pickled weights":
        torch.save(Trap(path.parent / "sprung"), path / "pytorch_model.bin")
    if kind == "half the weights":
        weights.write_bytes(weights.read_bytes()[:weights.stat().st_size // 2])
    if kind == "a weight missing":
        tensors = load_file(weights)
        del tensors["lm_head.weight"]
        save_file(tensors, weights, {"format": "pt"})
    if kind.endswith(".json"):
        (path / kind).write_text("{")
    if kind == "another shape":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 64}))


CANNOT = "cannot be loaded"
MODELS = {"missing": CANNOT, "empty": CANNOT, "without tokenizer": "has no tokenizer", "no weights": CANNOT,
          "pickled weights": CANNOT, "half the weights": CANNOT, "a weight missing": "its weights lack .*lm_head",
          "another shape": CANNOT, "config.json": CANNOT, "tokenizer.json": CANNOT,
          "no end": "no end-of-sequence id", "a weight that is nan": "its logits are not numbers",
          "a larger tokenizer": "its tokenizer has ids up to 160, and its embedding 160 rows"}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", STAGES)
def test_bad_models(desk, name, kind):
    spoil(kind, desk.path / "model")
    desk.fails(name, f"--model {desk.path / 'model'}: .*{MODELS[kind]}", {"--model": desk.path / "model"})
    assert not (desk.path / "sprung").exists()  # pickled weights are never unpickled


def test_a_model_that_scales_its_embeddings_is_refused(tmp_path):
    """Gemma multiplies them by the square root of its width: a prefix moved in W would be another one."""
    config = AutoConfig.for_model("gemma", **SHAPE, head_dim=8, initializer_range=0.15)
    save(tmp_path, AutoModelForCausalLM.from_config(config))
    with pytest.raises(UserError, match="GemmaForCausalLM scales its embeddings or logits"):
        common.load_model(Namespace(model=str(tmp_path), dtype="float32"), torch.device("cpu"))


@pytest.mark.parametrize("name", [*READERS, "train_sft"])
def test_chat_without_a_template(desk, name):
    without = {"--model": save(desk.path / "plain", tokenizer=tiny_tokenizer(chat=False))}
    desk.rows.write_text(json.dumps({"problem": "x", "response": "y"}) + "\n")
    desk.fails(name, "--prompt-format chat: .* no chat template", without | {"--prompt-format": "chat"})
    chat = row(problem=[{"role": "user", "content": "x"}], response="y")
    desk.data.write_bytes(chat)
    desk.rows.write_bytes(chat)
    desk.fails(name, "chat messages needs a chat template", without)


def test_a_role_that_the_template_refuses(desk):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only roles user and assistant') }}"
    path = save(desk.path / "strict", tokenizer=tokenizer)
    desk.fails("rollout", "refused by the tokenizer of --model .*only roles", {"--model": path})
    tokenizer.chat_template = "{{ date_string }}"  # Llama's, which is not to change from day to day
    dated = rollout.prompt_ids(tokenizer, "x", Namespace(prompt_format="chat", instruction=""))
    assert tokenizer.decode(dated) == "26 Jul 2024"
    base = Namespace(eos_token_id=1, get_vocab=lambda: {"<|im_end|>": 7})  # as Qwen's: a turn ends all the same
    assert common.eos_ids(Namespace(generation_config=Namespace(eos_token_id=None)), base) == [1, 7]


# --- flags ------------------------------------------------------------------------------------------------------------
SAMPLING = {"--temperature": ["-1", "nan"], "--top-p": ["0", "1.5", "nan"], "--top-k": ["-1"],
            "--max-new-tokens": ["0", "-3"], "--limit": ["-1"], "--decode-rows": ["0"], "--decode-tokens": ["-1", "5"]}
REVISION = {"--rho": ["0", "1", "-0.1", "1.5", "nan"], "--revision-steps": ["-1"], "--gamma0": ["0", "1.5", "nan"],
            "--continuations": ["0"], "--record-every": ["-1"], "--alpha-guide": ["nan"], "--beta-nll": ["inf"],
            "--explore-weight": ["nan"], "--min-logprob": ["nan"], "--eps-stop": ["nan"], "--revise-tokens": ["0"]}
TRAINING = {"--steps": ["0", "-1"], "--batch-size": ["0"], "--train-tokens": ["0"], "--lr": ["-1", "nan"],
            "--grad-clip": ["0", "nan"], "--weight-decay": ["-1"], "--save-every": ["-1"]}
GRPO = {"--group-size": ["1"], "--updates": ["0"], "--resample": ["-1"],
        "--overlong-buffer": ["-1"], "--temperature": ["0.5"], "--top-p": ["0.9"], "--top-k": ["5"],
        "--kl-coef": ["-1", "nan"], "--clip-low": ["-0.1"], "--clip-high": ["nan"]}
RANGES = [(name, flag, value) for names, flags in [
              (STAGES, {"--device": ["abacus", "cuda:63"]}), (SAMPLERS, SAMPLING), (["revise", "train_grpo"], REVISION),
              (["train_sft", "train_grpo"], TRAINING), (["train_grpo"], GRPO), (["rollout"], {"-n": ["0"]}),
              (["eval"], {"--k": ["0", "3"], "-n": ["0"]})]
          for name in names for flag, values in flags.items() for value in values]


@pytest.mark.parametrize("name,flag,value", RANGES)
def test_flags_out_of_range(desk, name, flag, value):
    # the word after the dashes, so that the message may call it by its long or its short name
    desk.fails(name, rf"-{flag.lstrip('-')}:? \[?{re.escape(value)}", {flag: value})


@pytest.mark.parametrize("name", SAMPLERS)
def test_verifiers_that_are_not_there(desk, name):
    broken, number = desk.path / "broken.py", desk.path / "number.py"
    broken.write_text("def verify(:\n")
    number.write_text("verify = 3\nimport math\n")
    for spec in ("nope.py:verify", f"{desk.path / 'v.py'}:nope", str(desk.path / "v.py"), f"{broken}:verify",
                 f"{number}:verify", f"{desk.path}:verify"):
        desk.fails(name, "--verifier", {"--verifier": spec})


@pytest.mark.parametrize("name", STAGES)
def test_flags_that_do_not_parse(desk, name):
    desk.fails(name, "unrecognized arguments: --bogus", {"--bogus": 1})
    desk.fails(name, "--seed: invalid int", {"--seed": "x"})
    assert not desk.out.exists()


# --- output folders ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", STAGES)
def test_out_is_a_file(desk, name):
    desk.out.write_text("precious")
    desk.fails(name, f"{desk.out}.*: (File exists|Not a directory)")
    assert desk.out.read_text() == "precious"


@pytest.mark.parametrize("name", STAGES)
def test_a_folder_in_use_takes_no_other_settings_or_data_but_after_a_failure(desk, name):
    desk.fails(name, "--model", {"--model": desk.path / "typo", "--seed": 3})
    assert desk.run(name, {})[0] == 0
    assert json.loads((desk.out / "run.json").read_text())["settings"]["seed"] == 0
    desk.fails(name, "--seed 0, and this one asks for 5", {"--seed": 5})
    if name == "revise":
        desk.write_rollouts(answer="other")
    else:
        with (desk.rows if name == "train_sft" else desk.data).open("a") as f:
            f.write("\n")
    desk.fails(name, "data.digest")


# --- rollouts and training rows ---------------------------------------------------------------------------------------
def test_rollouts_that_cannot_be_revised(desk):
    desk.fails("revise", r"nope.*No such file", {"--rollouts": desk.path / "nope"})
    desk.fails("revise", "--gold permuted needs", {"--gold": "permuted", "--limit": 1})
    desk.fails("revise", "prefix has 8 tokens.*--max-new-tokens 8", {"--max-new-tokens": 8})
    desk.write_rollouts(prompt_ids=[5] * 505)
    desk.fails("revise", "prefix has 8 tokens.* context of --model, 512")
    asks = write_verifier(desk.path / "three.py", "def verify(response, answer, problem):\n    return False\n")
    desk.fails("revise", "asks for the problem", {"--verifier": asks})
    file = desk.rollouts / "rollouts.jsonl"
    file.write_text('{"id": "a"}\n')
    desk.fails("revise", r"rollouts\.jsonl:1: no field 'sample'")
    file.write_text("")
    desk.fails("revise", r"rollouts\.jsonl: holds no rollouts")
    file.unlink()
    desk.fails("revise", r"rollouts\.jsonl: No such file")


@pytest.mark.parametrize("record,message", [
    ({"prompt_ids": [5], "response_ids": [6], "reward": 0}, "no rows to train on"),
    ({"problem": "x", "response": "y", "reward": 0}, "no rows to train on"),
    ({"prompt_ids": [5], "response_ids": [6] * 600}, "record 1: longer than the context of --model, 512"),
    ({"problem": "x" * 600, "response": "y"}, "record 1: longer than the context"),
    *[({"prompt_ids": [5], "response_ids": x}, "record 1: 'response_ids'") for x in ([], [160])],
    *[({"prompt_ids": x, "response_ids": [5]}, "record 1: 'prompt_ids'") for x in ([], "abc")],
    ({"prompt_ids": [5]}, "record 1: needs prompt_ids and response_ids, or problem and response"),
    *[({"problem": "x"} | more, "record 1: needs") for more in ({}, {"response": None})],
    *[({"problem": x, "response": "y"}, "record 1: the problem is neither") for x in (5, [1])],
    ({"problem": "x", "response": "a\ud800"}, "record 1: .*response"),
], ids=lambda x: "" if isinstance(x, str) else json.dumps(x)[:40])
def test_rows_that_cannot_be_trained_on(desk, record, message):
    desk.rows.write_text(json.dumps(record) + "\n")
    desk.fails("train_sft", rf"rows\.jsonl: {message}")


def test_several_training_files_are_told_apart(desk):
    bad = desk.path / "second.jsonl"
    bad.write_text('{"prompt_ids": [5], "response_ids": [6]}\n{"prompt_ids": \n')
    desk.fails("train_sft", r"second\.jsonl:2: not JSON", {"--data": [desk.rows, bad]})


@pytest.mark.parametrize("start,processes", [(run, 1), (stage, 2)])
def test_real_processes_end_in_one_line_each_and_exit_code_2(tmp_path, model_dir, start, processes):
    result = start("rollout.py", "--model", model_dir, "--data", tmp_path / "nope.jsonl", "--out", tmp_path / "o",
                   processes=processes, check=False)
    assert result.returncode == 2 and result.stdout == "" and not (tmp_path / "o").exists()
    said = re.findall(r"rollout\.py: error: .*nope\.jsonl: No such file.*\n", result.stderr)
    assert len(said) == processes and "Traceback" not in result.stderr
    assert processes > 1 or said == [result.stderr]  # gloo may have a word to say
