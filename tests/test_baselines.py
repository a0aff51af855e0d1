"""baselines/: the prompts that are sampled from, and what is kept of them."""
import json

import pytest
from conftest import PARITY, here, read, tiny_tokenizer, write_problems, write_verifier

import rollout
from baselines import hint
from helpers import common


def texts(rows: list[dict]) -> dict[str, str]:
    return {r["id"]: tiny_tokenizer().decode(r["prompt_ids"]) for r in rows}


@pytest.fixture
def run(tmp_path, model_dir):
    """run(flags) of baselines.hint: rollouts.jsonl, recovered.jsonl and summary.json of TMP/o."""
    flags = ["--model", model_dir, "--data", write_problems(tmp_path / "d.jsonl"), "-n", 4, "--device", "cpu",
             "--max-new-tokens", 10, "--verifier", write_verifier(tmp_path / "v.py", PARITY), "--out", tmp_path / "o"]

    def run(*more):
        here("baselines.hint", *flags, *more)
        return (read(tmp_path / "o/rollouts.jsonl"), read(tmp_path / "o/recovered.jsonl"),
                json.loads((tmp_path / "o/summary.json").read_text()))
    return run


def test_the_hint_is_sampled_from_and_left_out_of_what_is_trained_on(tmp_path, run, capsys, monkeypatch):
    rows, recovered, summary = run("--hint", "It is {answer}.")
    assert texts(rows) == {
        f"p{i}": f"[user]{i}+{i}?\nIt is {2 * i}.\n{rollout.INSTRUCTION}[assistant]" for i in range(5)}
    assert [r | {"prompt_ids": 0} for r in recovered] == [r | {"prompt_ids": 0} for r in rows if r["reward"]]
    assert 0 < len(recovered) < len(rows) == 20
    plain = texts(recovered)
    assert plain == {i: f"[user]{i[1:]}+{i[1:]}?\n{rollout.INSTRUCTION}[assistant]" for i in plain}
    assert summary == {"problems": 5, "n": 4, "recovered_trajectories": len(recovered),
                       "recovered_prompts": len({r["id"] for r in recovered})}
    printed = capsys.readouterr().out
    (tmp_path / "o/recovered.jsonl").unlink()  # as after a kill
    assert run("--hint", "It is {answer}.") == (rows, recovered, summary)
    monkeypatch.setattr(common, "load_model", None)  # a complete run does not need it
    assert run("--hint", "It is {answer}.") == (rows, recovered, summary)
    assert capsys.readouterr().out == 2 * printed


def test_a_permuted_hint_tells_another_answer_and_counts_how_often_it_is_given(tmp_path, run):
    verifier = write_verifier(tmp_path / "w.py", "def verify(response, gold):\n    return gold == '4'\n")
    rows, _, summary = run("--verifier", verifier, "--gold", "permuted")
    answers = {i: t.split("The correct answer is ")[1].split(".")[0] for i, t in texts(rows).items()}
    assert sorted(answers.values()) == ["0", "2", "4", "6", "8"]
    assert all(answers[f"p{i}"] != str(2 * i) for i in range(5))
    assert (summary["recovered_prompts"], summary["told_prompts"]) == (1, 1)  # p2's gold is 4; one is told it


def test_perturbed_prompts_begin_with_words_that_say_nothing(run):
    prompts = texts(run("--from", "perturbed", "--words", "7")[0])
    lines = {i: t.removeprefix("[user]").split("\n")[0] for i, t in prompts.items()}
    assert all(len(x.split()) == 7 and set(x.lower().strip(".").split()) <= set(hint.LOREM) for x in lines.values())
    assert len(set(lines.values())) == 5  # each problem its own
    assert all(f".\n{i[1:]}+{i[1:]}?\n" in t for i, t in prompts.items())


def test_text_goes_to_the_last_chat_message():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}]
    assert hint.add_text(messages, "b", "a") == [messages[0], {"role": "user", "content": "b\n1+1?\na"}]
    assert messages[1]["content"] == "1+1?" and hint.add_text("1+1?") == "1+1?"


@pytest.mark.parametrize("more,message", [
    (["--hint", "none"], "--hint: 'none' has no {answer}"), (["-n", "0"], "-n/--n: 0 is out of range"),
    (["--words", "0"], "--words: 0"), (["--from", "perturbed", "--gold", "permuted"], "--gold permuted")])
def test_flags_that_make_no_sense_are_named(tmp_path, run, capsys, more, message):
    with pytest.raises((common.UserError, SystemExit)) as e:
        run(*more)
    assert message in f"{e.value}{capsys.readouterr().err}" and not (tmp_path / "o").exists()
