"""show.py: what it says about a prefix is what the prefix is; hostile model output stays text."""
import argparse

import pytest
import torch
from conftest import TOKENS, here, read, tiny_model, tiny_tokenizer

import revise
from experiments import show
from helpers import common


def record(**changes):
    g = torch.Generator().manual_seed(0)
    ids = lambda: torch.randint(2, TOKENS, (6,), generator=g).tolist()
    r, again = ids(), ids()
    return {"id": "p", "sample": 0, "answer": "5", "recovered": True, "kept": 0.5, "prefix_ids": r,
            "projected_ids": ids(), "passes": 4, "vertices": [again, ids(), again[:3] + [revise.STAYS] * 3],
            "gammas": [0.1, 0.2, 0.3], "gaps": [3.0, 2.0, 1.0], "losses": [[-1.0, 2.0, 3.0]] * 4,
            "continuations": [{"reward": 1, "response": "\\boxed{5}"}]} | changes


def write(folder, *records):
    """As revise.py leaves them."""
    (folder / "revised.jsonl").write_text("".join(map(common.to_line, records)))


def run(folder, *flags):
    here("experiments.show", folder / "revised.jsonl", *flags)


def test_eq7_weights_and_distances_are_those_of_the_replayed_prefix():
    W, r = tiny_model("qwen2").get_input_embeddings().weight.detach(), record()
    E = revise.replay(W, r)
    for j, row in enumerate(show.explain(r, tiny_tokenizer(), W)):
        weights = [w for _, w in row["toward"]]
        left = 0.9 * 0.8 * (0.7 if j < 3 else 1)  # stays on the original token
        assert sum(weights) == pytest.approx(1 - left) and weights == sorted(weights, reverse=True)
        assert max(weights) == pytest.approx(0.3 + 0.1 * 0.8 * 0.7 if j < 3 else 0.2)  # toward one token twice
        start = W[r["prefix_ids"][j]]
        assert row["moved"] == pytest.approx(float((E[j] - start).norm() / start.norm()), rel=1e-5)
        assert row["changed"] == (r["prefix_ids"][j] != r["projected_ids"][j])
    assert [s[1] for s in show.steps_of(r)] == [0.1, 0.2, 0.3, None]  # the last step was not taken


def test_show_reads_the_model_from_run_json(tmp_path, model_dir, capsys):
    write(tmp_path, record(), record(sample=1, recovered=False))
    with pytest.raises(common.UserError, match="--model"):
        run(tmp_path, "--id", "p")
    made = common.start_run(tmp_path / "o", argparse.Namespace(model=str(model_dir))) / "run.json"
    made.rename(tmp_path / "run.json")
    for flags, shown in (([], "rollout 1"), (["--sample", "0"], "rollout 0")):
        run(tmp_path, "--id", "p", *flags)
        assert shown in capsys.readouterr().out
    with pytest.raises(common.UserError, match="--id q"):
        run(tmp_path, "--id", "q")


def test_a_rollout_that_stopped_before_its_first_step_is_shown_and_one_moved_by_adam_is_not(
        tmp_path, model_dir, capsys):
    still = {"vertices": [], "gammas": []}
    write(tmp_path, record(id="stopped", gaps=[], losses=[[-1.0, 0.0, 3.0]], **still), record(id="adam", **still))
    run(tmp_path, "--model", str(model_dir), "--id", "stopped")
    assert "stopped rollout 0" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="moved by --adam"):
        run(tmp_path, "--model", str(model_dir), "--id", "adam")


def test_what_min_logprob_dropped_is_not_called_wrong():
    kinds = [{"reward": 1}, {"reward": 0}, {"reward": 0, "logprob": -2.0}, {"reward": 1, "logprob": -0.1}]
    assert [show.verdict(c) for c in kinds] == ["right", "wrong", "right, unlikely", "right"]


WRONG = [None, True, -1, 1.5, "x", "", [], {}, ["x"], [[1]], 10**30, [10**30], [-1], "\ud800", "\x1b[2J\n",
         [{"reward": 0, "response": "\x1b[2J\x00"}]]


@pytest.mark.parametrize("field", [
    "prefix_ids", "projected_ids", "vertices", "gammas", "gaps", "losses", "kept", "answer", "recovered",
    "continuations", "sample", "passes"])
def test_show_says_what_it_cannot_read_and_shows_the_rest_as_text(tmp_path, model_dir, monkeypatch, capsys, field):
    policy = common.load_model(argparse.Namespace(model=str(model_dir), dtype="float32"), torch.device("cpu"))
    monkeypatch.setattr(common, "load_model", lambda *_: policy)
    file = tmp_path / "revised.jsonl"
    write(tmp_path, record())
    good, = read(file)
    for wrong in WRONG:
        file.write_text(common.to_line(good | {field: wrong}))
        try:
            run(tmp_path, "--id", "p", "--model", str(model_dir))
        except common.UserError as e:
            assert str(tmp_path) in str(e)
        shown = capsys.readouterr().out
        assert not {*"\x1b\x00\ud800"} & {*shown}
        assert (field, wrong) != ("continuations", WRONG[-1]) or "\\x1b[2J" in shown
