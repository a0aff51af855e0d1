"""baselines/: the prompts that are sampled from, and what is kept of them."""
import json

import pytest
from conftest import PARITY, read, write_problems, write_verifier

import rollout
from baselines import hint
from helpers import common


@pytest.fixture
def flags(tmp_path, model_dir):
    return ["--model", str(model_dir), "--data", str(write_problems(tmp_path / "d.jsonl")), "-n", "4", "--device",
            "cpu", "--max-new-tokens", "10", "--verifier", write_verifier(tmp_path / "v.py", PARITY)]


def texts(tmp_path, model_dir, rows):
    args = hint.get_args(["--model", str(model_dir), "--data", "d", "--out", "o"])
    args.dtype = "float32"
    tokenizer = common.load_model(args, common.pick_device(args))[1]
    return {r["id"]: tokenizer.decode(r["prompt_ids"]) for r in rows}


def test_the_hint_is_sampled_from_and_left_out_of_what_is_trained_on(tmp_path, model_dir, flags):
    hint.main(hint.get_args([*flags, "--out", str(tmp_path / "o"), "--hint", "It is {answer}."]))
    rows, recovered = read(tmp_path / "o/rollouts.jsonl"), read(tmp_path / "o/recovered.jsonl")
    assert texts(tmp_path, model_dir, rows) == {
        f"p{i}": f"[user]{i}+{i}?\nIt is {2 * i}.\n{rollout.INSTRUCTION}[assistant]" for i in range(5)}
    assert [r | {"prompt_ids": 0} for r in recovered] == [r | {"prompt_ids": 0} for r in rows if r["reward"]]
    assert 0 < len(recovered) < len(rows) == 20
    plain = texts(tmp_path, model_dir, recovered)
    assert plain == {i: f"[user]{i[1:]}+{i[1:]}?\n{rollout.INSTRUCTION}[assistant]" for i in plain}
    summary = json.loads((tmp_path / "o/summary.json").read_text())
    assert summary == {"problems": 5, "n": 4, "recovered_trajectories": len(recovered),
                       "recovered_prompts": len({r["id"] for r in recovered})}
    hint.main(hint.get_args([*flags, "--out", str(tmp_path / "o"), "--hint", "It is {answer}."]))  # as it was
    assert read(tmp_path / "o/recovered.jsonl") == recovered


def test_a_permuted_hint_tells_another_answer_and_counts_how_often_it_is_given(tmp_path, model_dir, flags):
    flags[-1] = write_verifier(tmp_path / "w.py", "def verify(response, gold):\n    return gold == '4'\n")
    hint.main(hint.get_args([*flags, "--out", str(tmp_path / "o"), "--gold", "permuted"]))
    told = texts(tmp_path, model_dir, read(tmp_path / "o/rollouts.jsonl"))
    answers = {i: t.split("The correct answer is ")[1].split(".")[0] for i, t in told.items()}
    assert sorted(answers.values()) == ["0", "2", "4", "6", "8"]
    assert all(answers[f"p{i}"] != str(2 * i) for i in range(5))
    summary = json.loads((tmp_path / "o/summary.json").read_text())
    assert (summary["recovered_prompts"], summary["told_prompts"]) == (1, 1)  # p2's gold is 4; one is told it


def test_perturbed_prompts_begin_with_words_that_say_nothing(tmp_path, model_dir, flags):
    hint.main(hint.get_args([*flags, "--out", str(tmp_path / "o"), "--from", "perturbed", "--words", "7"]))
    prompts = texts(tmp_path, model_dir, read(tmp_path / "o/rollouts.jsonl"))
    lines = {i: t.removeprefix("[user]").split("\n")[0] for i, t in prompts.items()}
    assert all(len(x.split()) == 7 and set(x.lower().strip(".").split()) <= set(hint.LOREM) for x in lines.values())
    assert len(set(lines.values())) == 5  # each problem its own
    assert all(f".\n{i[1:]}+{i[1:]}?\n" in t for i, t in prompts.items())


def test_text_goes_to_the_last_chat_message():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}]
    assert rollout.add_text(messages, "b", "a") == [messages[0], {"role": "user", "content": "b\n1+1?\na"}]
    assert messages[1]["content"] == "1+1?" and rollout.add_text("1+1?") == "1+1?"


@pytest.mark.parametrize("more,message", [
    (["--hint", "none"], "--hint 'none' has no {answer}"), (["-n", "0"], "--n 0 is out of range"),
    (["--words", "0"], "--words 0"), (["--from", "perturbed", "--gold", "permuted"], "--gold permuted")])
def test_flags_that_make_no_sense_are_named(tmp_path, flags, more, message):
    with pytest.raises(common.UserError, match=message.replace("{", r"\{").replace("'", ".")):
        hint.main(hint.get_args([*flags, "--out", str(tmp_path / "o"), *more]))
    assert not (tmp_path / "o").exists()
