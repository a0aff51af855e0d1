"""show.py: what it says about a prefix is what the prefix is; hostile model output stays text."""
import argparse

import pytest
import torch
from conftest import TOKENS, tiny_model, tiny_tokenizer

import revise
from experiments import show
from helpers import common


def record(**changes):
    g = torch.Generator().manual_seed(0)
    ids = lambda: torch.randint(2, TOKENS, (6,), generator=g).tolist()
    r = ids()
    return {"id": "p", "sample": 0, "answer": "5", "recovered": True, "kept": 0.5, "prefix_ids": r,
            "projected_ids": ids(), "passes": 4, "atoms": [r, ids(), r[:3] + ids()[3:], ids()],
            "weights": [0.9 * 0.8 * 0.7, 0.1 * 0.8 * 0.7, 0.2 * 0.7, 0.3], "gammas": [0.1, 0.2, 0.3],
            "gaps": [3.0, 2.0, 1.0], "losses": [[-1.0, 2.0, 3.0]] * 4,
            "continuations": [{"reward": 1, "response": "\\boxed{5}"}]} | changes


def explain(r, W):
    return show.explain(r, torch.tensor(r["atoms"]), r["weights"], tiny_tokenizer(), W)


def write(folder, *records):
    """As revise.py leaves them."""
    lines = map(common.to_line, revise.shelve_prefixes(iter(records), folder))
    (folder / "revised.jsonl").write_text("".join(lines))


def test_eq7_weights_and_distances_are_those_of_the_rebuilt_prefix():
    W, r = tiny_model("qwen2").get_input_embeddings().weight.detach(), record()
    rows = explain(r, W)
    E = revise.soft_prefix(W, r["atoms"], r["weights"])
    left = 0.9 * 0.8 * 0.7  # weight that stays on the original token
    for j, row in enumerate(rows):
        assert sum(w for _, w in row["toward"]) == pytest.approx(1 - left)
        start = W[r["prefix_ids"][j]]
        assert row["moved"] == pytest.approx(float((E[j] - start).norm() / start.norm()), rel=1e-5)
        assert row["changed"] == (r["prefix_ids"][j] != r["projected_ids"][j])
    assert [w for w in dict(rows[0]["toward"]).values()] == sorted(dict(rows[0]["toward"]).values(), reverse=True)


def test_a_step_that_was_not_taken_has_no_gamma():
    assert [s[1] for s in show.steps_of(record())] == [0.1, 0.2, 0.3, None]


def test_hostile_text_is_escaped():
    hostile = "<script>alert(1)</script>\x1b[2J\x00"
    r = record(answer=hostile, continuations=[{"reward": 0, "response": hostile}])
    rows = explain(r, tiny_model("qwen2").get_input_embeddings().weight.detach())
    page, text = show.as_html(r, rows), show.as_text(r, rows)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "\x1b" not in page + text and "\x00" not in page + text


def test_show_reads_the_model_from_run_json(tmp_path, model_dir, capsys):
    write(tmp_path, record(), record(sample=1, recovered=False))
    with pytest.raises(common.UserError, match="--model"):
        show.main(show.get_args([str(tmp_path / "revised.jsonl"), "--id", "p"]))
    args = argparse.Namespace(model=str(model_dir), out=str(tmp_path))
    common.start_run(tmp_path, args)
    show.main(show.get_args([str(tmp_path / "revised.jsonl"), "--id", "p"]))
    assert "rollout 1" in capsys.readouterr().out
    show.main(show.get_args([str(tmp_path / "revised.jsonl"), "--id", "p", "--sample", "0",
                             "--html", str(tmp_path / "p.html")]))
    assert "rollout 0" in (tmp_path / "p.html").read_text()
    with pytest.raises(common.UserError, match="--id q"):
        show.main(show.get_args([str(tmp_path / "revised.jsonl"), "--id", "q"]))


def test_prefixes_are_shelved_in_files_of_bounded_size_and_read_back_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(revise, "SHELF_BYTES", 300)  # a record has 4 x 6 ids and 4 weights: 128 bytes
    records = [record(id=f"../{i}", sample=i) for i in range(8)]  # an id is a key, never a path
    write(tmp_path, *records)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"prefixes-0000{i}.safetensors" for i in range(3)), "revised.jsonl"]
    for before, r in zip(records, common.read_jsonl(tmp_path / "revised.jsonl")):
        assert "atoms" not in r and "weights" not in r
        atoms, weights = revise.load_prefix(tmp_path, r)
        assert (atoms.tolist(), weights) == (before["atoms"], before["weights"])
    for name in ("../x.safetensors", "gone.safetensors", "revised.jsonl"):
        with pytest.raises(common.UserError, match="cannot be read"):
            revise.load_prefix(tmp_path, r | {"prefix_file": name})


def test_a_rollout_that_stopped_before_its_first_step_is_shown_and_one_moved_by_adam_is_not(
        tmp_path, model_dir, capsys):
    r = record()["prefix_ids"]
    write(tmp_path, record(id="stopped", atoms=[r], weights=[1.0], gammas=[], gaps=[], losses=[[-1.0, 0.0, 3.0]]),
          record(id="adam", atoms=[r], weights=[1.0], gammas=[]))
    flags = [str(tmp_path / "revised.jsonl"), "--model", str(model_dir), "--id"]
    show.main(show.get_args([*flags, "stopped"]))
    assert "stopped rollout 0" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="moved without Frank-Wolfe"):
        show.main(show.get_args([*flags, "adam"]))


def test_what_min_logprob_dropped_is_not_called_wrong():
    kinds = [{"reward": 1}, {"reward": 0}, {"reward": 0, "logprob": -2.0}, {"reward": 1, "logprob": -0.1}]
    assert [show.verdict(c) for c in kinds] == ["right", "wrong", "right, unlikely", "right"]
