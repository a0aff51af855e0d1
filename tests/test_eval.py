"""eval.py: pass@k against enumeration, intervals against their coverage, the table against the samples beside it."""
import json
import shutil
from itertools import combinations

import numpy as np
import pytest
from conftest import assert_same_sampling, files, here, read, save, stage, tiny_model, write_problems, write_verifier

import eval as evaluation
from experiments.demo import wilson_interval
from helpers import common


@pytest.mark.parametrize("n", range(1, 9))
def test_chen_eq1_pass_at_k_equals_enumeration_of_all_subsets(n):
    for c in range(n + 1):
        correct = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(combinations(correct, k))
            assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("n,c,k", [(8, 9, 1), (8, -1, 1), (8, 2, 9), (8, 2, 0)])
def test_chen_eq1_pass_at_k_refuses_what_has_no_meaning(n, c, k):
    with pytest.raises(ValueError, match="pass@"):
        evaluation.pass_at_k(n, c, k)


def test_pass_at_k_is_exact_where_floating_point_products_are_not():
    assert evaluation.pass_at_k(1024, 1, 512) == 0.5


def test_bootstrap_interval_equals_resampling_written_out():
    rng = np.random.default_rng(1)
    values = [*rng.random(9), 0.5, 0.5]  # some values are equal, as shares of n samples often are
    means = [np.mean([values[i] for i in rng.integers(11, size=11)]) for _ in range(20_000)]
    assert evaluation.bootstrap_interval(values) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.01)
    assert evaluation.bootstrap_interval(values, 3) == evaluation.bootstrap_interval(values, 3)
    assert evaluation.bootstrap_interval([0.5] * 4) == (0.5, 0.5)


@pytest.mark.parametrize("successes,n,low,high", [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634),
                                                  (1, 100, 0.0018, 0.0545), (0, 0, 0.0, 1.0)])
def test_wilson_interval_equals_published_values(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("paths,names", [
    (["out/sft/model", "out/grpo/model"], ["sft-model", "grpo-model"]), (["Qwen/Qwen3-8B-Base"], ["Qwen3-8B-Base"]),
    (["a/math500.jsonl", "aime.v2.jsonl"], ["math500", "aime.v2"]), (["."], ["model"]),
    (["x/a/m", "y/a/m", "y/b/m"], ["x-a-m", "y-a-m", "y-b-m"]),
    (["../toy_model", "./other/"], ["toy_model", "other"])])
def test_distinct_names_are_the_shortest_endings_that_differ(paths, names, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert evaluation.distinct_names(paths) == names


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir):
    """Two models on two problem sets."""
    path = tmp_path_factory.mktemp("eval")
    other = save(path / "other", tiny_model("qwen3", tied=False, seed=3))
    sets = write_problems(path / "one.jsonl", 5), write_problems(path / "two.jsonl", 3)
    flags = ["--model", model_dir, other, "--data", *sets, "-n", 4, "--k", 1, 3, "--max-new-tokens", 6,
             "--decode-rows", 8, "--verifier", write_verifier(path / "v.py")]
    result = stage("eval.py", *flags, "--out", path / "out")
    return path / "out", flags, result


def test_results_equal_a_recount_from_the_saved_samples(finished):
    out, _, result = finished
    results = json.loads((out / "results.json").read_text())
    assert [(r["model"], r["data"]) for r in results] == [(m, d) for m in ("qwen2", "other") for d in ("one", "two")]
    lines = (out / "results.md").read_text().splitlines()
    assert result.stdout.splitlines()[-4:] == lines
    assert lines[0] == "| model | one @1 | one @3 | two @1 | two @3 | avg @1 | avg @3 |"
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines[2:]}
    for model in ("qwen2", "other"):  # the paper's avg: the mean over the problem sets
        of = [r for r in results if r["model"] == model]
        for column, k in enumerate(("1", "3")):
            assert float(cells[model][4 + column].strip(" |")) == pytest.approx(
                50 * sum(r["pass"][k] for r in of), abs=0.006)
    for r in results:
        rows = read(out / r["model"] / r["data"] / "rollouts.jsonl")
        assert len(rows) == 4 * r["problems"] == 4 * {"one": 5, "two": 3}[r["data"]]
        assert all(row["reward"] == len(row["response"]) % 2 for row in rows)
        assert r["mean_tokens"] == pytest.approx(sum(len(row["response_ids"]) for row in rows) / len(rows))
        assert r["truncated"] == sum(row["finish"] == "length" for row in rows) / len(rows)
        for column, k in enumerate((1, 3)):
            share = []
            for i in {row["id"] for row in rows}:
                subsets = list(combinations([row["reward"] for row in rows if row["id"] == i], k))
                share.append(sum(map(any, subsets)) / len(subsets))
            expected = sum(share) / len(share)
            assert 0 < expected
            assert r["pass"][str(k)] == pytest.approx(expected)
            low, high = r["interval"][str(k)]
            assert low <= expected <= high
            cell = cells[r["model"]][column + (2 if r["data"] == "two" else 0)]
            assert cell.startswith(f"{100 * expected:.2f} [{100 * low:.1f}, {100 * high:.1f}]")


def test_two_processes_draw_the_same_and_print_one_table(tmp_path, finished):
    out, flags, first = finished
    result = stage("eval.py", *flags, "--out", tmp_path / "o", processes=2)
    assert_same_sampling(out, tmp_path / "o", lambda: stage("eval.py", *flags, "--out", tmp_path / "o"))
    mine, theirs = ((x / "results.md").read_text() for x in (tmp_path / "o", out))
    assert result.stdout == first.stdout.replace(theirs, mine)  # the two are equal but for a draw on a boundary


def test_models_sets_and_ks_join_a_folder_and_what_it_holds_needs_no_model(tmp_path, finished, monkeypatch, capsys):
    _, first, other, _, one, two, *more = map(str, finished[1])
    loaded, load = [], common.load_model
    monkeypatch.setattr(common, "load_model", lambda args, device: loaded.append(args.model) or load(args, device))

    def evaluate(*flags):
        loaded.clear()
        return here("eval", *more, "--out", tmp_path / "o", *flags)

    evaluate("--model", first, "--data", one)
    before = files(tmp_path / "o/qwen2/one")
    evaluate("--model", first, other, "--data", one)
    assert loaded == [other]
    results = evaluate("--model", first, other, "--data", one, two, "--k", "1", "2")
    assert loaded == [first, other] and len(results) == 4 and list(results[0]["pass"]) == ["1", "2"]
    whole, printed = files(tmp_path / "o"), capsys.readouterr().out.splitlines()[-4:]
    assert evaluate("--model", first, other, "--data", one, two, "--k", "1", "2") == results and not loaded
    assert files(tmp_path / "o") == whole and capsys.readouterr().out.splitlines() == printed
    moved = shutil.copy(one, str(tmp_path / "one.jsonl"))  # the same problems from elsewhere
    assert evaluate("--model", first, "--data", moved, "--k", "1", "2") == results[:1] and not loaded
    assert files(tmp_path / "o/qwen2/one") == before


def test_the_papers_average_is_over_its_four_sets():
    names = ["math500", "minerva", "aime24", "amc23", "aime25", "olympiadbench"]
    results = [{"model": "m", "data": d, "pass": {"1": i / 10}, "interval": {"1": (0, 1)}} for i, d in enumerate(names)]
    header, _, row = evaluation.table(results, [1]).splitlines()
    assert header.endswith("| olympiadbench @1 | paper's avg @1 |") and row.endswith("| 22.50 |")  # (0 + 2 + 3 + 4) / 4
    four = [r for r in results if r["data"] in evaluation.PAPER_AVERAGE]
    header, _, row = evaluation.table(four, [1]).splitlines()
    assert header.endswith("| aime25 @1 | avg @1 |") and row.endswith("| 22.50 |")
