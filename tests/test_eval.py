"""eval.py: pass@k against enumeration, intervals against their coverage, the table against the samples beside it."""
import json
import sys
import types
from itertools import combinations

import huggingface_hub
import numpy as np
import pytest
import test_stages
from conftest import assert_same_sampling, read, stage, tiny_model, tiny_tokenizer, write_problems, write_verifier

import eval as evaluation
from helpers import benchmarks, common


@pytest.mark.parametrize("n", range(1, 9))
def test_eq1_pass_at_k_equals_enumeration_of_all_subsets(n):
    for c in range(n + 1):
        correct = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(combinations(correct, k))
            assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("n,c,k", [(8, 9, 1), (8, -1, 1), (8, 2, 9), (8, 2, 0)])
def test_eq1_pass_at_k_refuses_what_has_no_meaning(n, c, k):
    with pytest.raises(ValueError, match="pass@"):
        evaluation.pass_at_k(n, c, k)


def test_pass_at_k_is_exact_where_floating_point_products_are_not():
    assert evaluation.pass_at_k(1024, 1, 512) == 0.5
    assert evaluation.pass_at_k(32, 0, 32) == 0 and evaluation.pass_at_k(32, 1, 32) == 1


def test_bootstrap_interval_covers_the_mean_about_95_percent_of_the_time(monkeypatch):
    monkeypatch.setattr(evaluation, "BOOTSTRAP", 500)
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        p = rng.beta(2, 3, size=60)  # problems of different difficulty; the mean is 0.4
        low, high = evaluation.bootstrap_interval((rng.binomial(8, p) / 8).tolist(), trial)
        covered += low <= 0.4 <= high
    assert 0.90 <= covered / 300 <= 0.98  # 95 % less a little: a percentile interval of 60 values is slightly narrow


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
    assert evaluation.wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_bounds_solve_its_defining_equation():
    for bound in evaluation.wilson_interval(7, 25):  # |p - bound| = z * standard error at the bound
        assert abs(7 / 25 - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / 25) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("paths,names", [
    (["out/sft/model", "out/grpo/model"], ["sft-model", "grpo-model"]), (["Qwen/Qwen3-8B-Base"], ["Qwen3-8B-Base"]),
    (["a/math500.jsonl", "aime.v2.jsonl"], ["math500", "aime.v2"]),
    (["x/a/m", "y/a/m", "y/b/m"], ["x-a-m", "y-a-m", "y-b-m"]),
    (["../toy_model", "./other/"], ["toy_model", "other"])])
def test_distinct_names_are_the_shortest_endings_that_differ(paths, names):
    assert evaluation.distinct_names(paths) == names


def test_distinct_names_of_the_folder_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert evaluation.distinct_names(["."]) == ["model"]


@pytest.mark.parametrize("paths", [["m", "m"], ["m", "./m"]])
def test_the_same_path_twice_is_refused(paths):
    with pytest.raises(common.UserError, match="twice"):
        evaluation.distinct_names(paths)


# --- the stage as a script --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir):
    """Two models on two problem sets."""
    path = tmp_path_factory.mktemp("eval")
    other = path / "other"
    tiny_model("qwen3", tied=False, seed=3).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    flags = ["--model", model_dir, other, "--data", write_problems(path / "one.jsonl", 5),
             write_problems(path / "two.jsonl", 3),
             "-n", 4, "--k", 1, 3, "--max-new-tokens", 6, "--device", "cpu", "--decode-rows", 8,
             "--verifier", write_verifier(path / "v.py")]
    result = stage("eval.py", *flags, "--out", path / "out")
    return path / "out", flags, result


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
            and p.name != "run.json"}


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


def test_a_second_run_samples_nothing_and_gives_the_same_bytes(finished):
    out, flags, first = finished
    before, times = tree(out), {p: p.stat().st_mtime_ns for p in out.rglob("rollouts.jsonl")}
    again = stage("eval.py", *flags, "--out", out)
    assert again.stdout == first.stdout and "rollout/s" not in again.stderr
    assert tree(out) == before and {p: p.stat().st_mtime_ns for p in out.rglob("rollouts.jsonl")} == times


# moments at which files change (conftest.die_at): 1-4 the two run.json, then a batch each, then renames
@pytest.mark.parametrize("kills", [(3,), (6,), (9, 8)], ids=str)
def test_a_killed_run_continues_to_the_same_results(tmp_path, finished, kills):
    out, flags, _ = finished
    for point in kills:
        stage("eval.py", *flags, "--out", tmp_path / "o", kill_at=point)
    stage("eval.py", *flags, "--out", tmp_path / "o")
    assert_same_sampling(out, tmp_path / "o", lambda: stage("eval.py", *flags, "--out", tmp_path / "o"))


def test_two_processes_draw_the_same_and_print_one_table(tmp_path, finished):
    out, flags, first = finished
    result = stage("eval.py", *flags, "--out", tmp_path / "o", processes=2)
    assert_same_sampling(out, tmp_path / "o", lambda: stage("eval.py", *flags, "--out", tmp_path / "o"))
    mine, theirs = ((x / "results.md").read_text() for x in (tmp_path / "o", out))
    assert result.stdout == first.stdout.replace(theirs, mine)  # the two are equal but for a draw on a boundary


def test_another_k_or_model_joins_a_folder_without_new_samples_for_what_is_there(tmp_path, finished):
    _, flags, _ = finished
    one = [flags[0], flags[1], *flags[3:]]
    stage("eval.py", *one, "--out", tmp_path / "o")
    stamp = (tmp_path / "o/qwen2/one/rollouts.jsonl").stat().st_mtime_ns
    stage("eval.py", *flags, "--k", 1, 2, "--out", tmp_path / "o")
    assert (tmp_path / "o/qwen2/one/rollouts.jsonl").stat().st_mtime_ns == stamp
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert len(results) == 4 and list(results[0]["pass"]) == ["1", "2"]
    refused = stage("eval.py", *flags, "-n", 8, "--out", tmp_path / "o", check=False)
    assert refused.returncode == 2 and "--n" in refused.stderr


# --- the paper's test sets by name ------------------------------------------------------------------------------------
@pytest.fixture
def small(tmp_path, monkeypatch):
    """A table of two made-up sets, and their files as the hub has them: --benchmark-dir finds the JSONL one."""
    monkeypatch.setattr(benchmarks, "TABLE", {
        "one": ("hub/one", "test.jsonl", "question", "answer", 3),
        "two": ("hub/two", "data/two.parquet", "problem", "final_answer", 2)})
    rows = [{"question": f"What is {i} plus {i}, please?", "answer": 2.0 * i} for i in range(3)]
    (tmp_path / "one.jsonl").write_text("".join(map(common.to_line, rows)))
    return tmp_path


def evaluate(path, model_dir, *flags):
    return evaluation.main(evaluation.get_args(list(map(str, [
        "--model", model_dir, "-n", 2, "--k", 1, "--max-new-tokens", 4, "--device", "cpu", "--out", path / "out",
        *flags]))))


def test_table_has_the_six_sets_of_the_paper_at_their_published_sizes():
    assert {name: row[4] for name, row in benchmarks.TABLE.items()} == {
        "math500": 500, "aime24": 30, "aime25": 30, "amc23": 40, "minerva": 272, "olympiadbench": 674}


def test_a_set_from_a_folder_has_stable_ids_and_text_answers(small):
    expected = [{"id": f"one-{i + 1}", "problem": f"What is {i} plus {i}, please?", "answer": f"{2.0 * i}"}
                for i in range(3)]
    assert benchmarks.load("one", small) == expected
    ours = [{"id": "x", "problem": r["problem"], "answer": r["answer"]} for r in expected]  # in our field names
    (small / "one.jsonl").write_text("".join(map(common.to_line, ours)))
    assert benchmarks.load("one", small) == expected


def test_a_download_asks_the_hub_for_the_file_of_the_table(small, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                        lambda *a, **k: asked.append((a, k)) or str(small / "one.jsonl"))
    assert benchmarks.load("one") == benchmarks.load("one", small)
    assert asked == [(("hub/one", "test.jsonl"), {"repo_type": "dataset"})]


def test_a_failed_download_names_the_flag_and_the_way_out(small):
    with pytest.raises(common.UserError,
                       match=r"--benchmarks one: test\.jsonl of hub/one cannot be downloaded .*--benchmark-dir"):
        benchmarks.load("one")  # HF_HUB_OFFLINE is set: nothing is looked for


def test_parquet_goes_through_datasets_or_says_that_it_is_missing(small, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda hub, file, repo_type: str(small / file))
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(common.UserError, match=r"--benchmarks two: two\.parquet .* package datasets .*--benchmark-dir"):
        benchmarks.load("two")
    rows = [{"problem": "a", "final_answer": ["1"]}, {"problem": "b", "final_answer": ["$2$, $3$"]}]
    fake = types.SimpleNamespace(disable_progress_bars=lambda: None, Dataset=types.SimpleNamespace(
        from_parquet=lambda path, columns: [{c: r[c] for c in columns} for r in rows]))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert [p["answer"] for p in benchmarks.load("two")] == ["1", "$2$, $3$"]


def test_a_real_parquet_file_is_read_where_datasets_is_installed(small, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="optional: only for test sets that the hub has as parquet")
    (small / "data").mkdir()
    datasets.Dataset.from_list([
        {"problem": "a", "final_answer": ["1"], "image": None},
        {"problem": "b", "final_answer": ["2"], "image": None}]).to_parquet(small / "data/two.parquet")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda hub, file, repo_type: str(small / file))
    assert benchmarks.load("two") == [{"id": "two-1", "problem": "a", "answer": "1"},
                                      {"id": "two-2", "problem": "b", "answer": "2"}]
    (small / "data/two.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(common.UserError, match=r"two\.parquet: cannot be read"):
        benchmarks.load("two")


@pytest.mark.parametrize("text,message", [
    ("", r"one\.jsonl: one has 3 problems, and this file 0"),
    ('{"question": "a", "answer": 1}\n' * 4, r"one\.jsonl: one has 3 problems, and this file 4"),
    ('{"question": "a", "answer": 1}\n' * 2 + '{"question": "a"}\n',
     r"one\.jsonl: record 3: no 'question' and 'answer'"),
    ('{"question": "a", "answer": 1}\n' * 2 + '{"question": " ", "answer": 1}\n',
     r"one\.jsonl: record 3: no 'question'"),
    ('{"question": "a", "answer": ["1", "2"]}\n' * 3, r"one\.jsonl: record 1: no 'question'"),
    ('{"question": "a", "answer": true}\n' * 3, r"one\.jsonl: record 1: no 'question'")])
def test_a_set_of_another_size_or_without_its_fields_is_refused(small, text, message):
    (small / "one.jsonl").write_text(text)
    with pytest.raises(common.UserError, match=message):
        benchmarks.load("one", small)


@pytest.mark.parametrize("flags,message", [
    (["--benchmarks", "math"], "--benchmarks math: not among one, two"),
    (["--benchmarks", "one,one", "--benchmark-dir", "."], "--benchmarks one: the name is taken"),
    (["--benchmarks", "one", "--benchmark-dir", ".", "--data", "one.jsonl"], "--benchmarks one: the name is taken"),
    (["--benchmarks", "two", "--benchmark-dir", "."], r"two\.jsonl: cannot be read"),
    ([], "--data or --benchmarks is needed"),
    (["--benchmarks", "one", "--benchmark-dir", ".", "--overlap", "nope.jsonl"], r"nope\.jsonl: cannot be read")])
def test_wrong_names_are_refused_before_anything_is_written(small, model_dir, monkeypatch, flags, message):
    monkeypatch.chdir(small)
    if "--data" in flags:
        write_problems(small / "one.jsonl", 3)
    with pytest.raises(common.UserError, match=message):
        evaluate(small, model_dir, *flags)
    assert not (small / "out").exists()


def test_sets_by_name_are_evaluated_like_files_and_overlap_is_counted_on_the_whole_set(small, model_dir, capsys):
    wrapped = test_stages.WRAPPER.format("what is $2$ plus $\\,2$, please")
    train = [{"prompt": [{"role": "user", "content": wrapped}]},
             {"problem": "Say: what is 0 plus 0, please? As an integer."}]
    (small / "train.jsonl").write_text("".join(map(common.to_line, train)))
    results = evaluate(small, model_dir, "--benchmarks", "one", "--benchmark-dir", small, "--limit", 2,
                       "--data", write_problems(small / "d.jsonl", 3), "--overlap", small / "train.jsonl")
    assert [(r["data"], r["problems"]) for r in results] == [("d", 2), ("one", 2)]
    assert {r["id"] for r in read(small / "out/qwen2/one/rollouts.jsonl")} == {"one-1", "one-2"}
    assert [r["overlap"] for r in json.loads((small / "out/results.json").read_text())] == [
        {"equal": [], "contained": []}, {"equal": ["one-3"], "contained": ["one-3"]}]
    assert "one: of 3 problems 1 are in" in capsys.readouterr().out
    before = (small / "out/qwen2/one/rollouts.jsonl").stat().st_mtime_ns
    moved = small / "moved"  # the same problems from elsewhere, and without --overlap: nothing is sampled again
    moved.mkdir()
    (small / "one.jsonl").rename(moved / "one.jsonl")
    again = evaluate(small, model_dir, "--benchmarks", "one", "--benchmark-dir", moved, "--limit", 2)
    assert again[0]["pass"] == results[1]["pass"] and "overlap" not in again[0]
    assert (small / "out/qwen2/one/rollouts.jsonl").stat().st_mtime_ns == before
    with (moved / "one.jsonl").open("a") as f, pytest.raises(common.UserError, match="4"):
        f.write('{"question": "more", "answer": 1}\n')
        f.flush()
        evaluate(small, model_dir, "--benchmarks", "one", "--benchmark-dir", moved, "--limit", 2)
    text = (moved / "one.jsonl").read_text().splitlines()
    (moved / "one.jsonl").write_text("\n".join([text[0], text[1].replace("2.0", "3.0"), text[2]]))
    with pytest.raises(common.UserError, match="data.digest"):
        evaluate(small, model_dir, "--benchmarks", "one", "--benchmark-dir", moved, "--limit", 2)


@pytest.mark.parametrize("one,other,same", [
    ("Find $x$ if  $x^2\\,=4$.", "find \\(x\\) if\n\\(x^2 = 4\\)", True),
    (r"$\left(\dfrac12\right)$", r"$(\frac12)$", True),
    ("Find $x+1$", "Find $x-1$", True),  # what ignoring signs costs
    ("Find $x^2$", "Find $x^3$", False), (r"\text{cm}", r"\textbf{cm}", False), ("\u4e8c", "\u4e09", False)])
def test_what_counts_as_the_same_problem(one, other, same):
    assert (benchmarks.plain(one) == benchmarks.plain(other)) is same


def test_a_problem_inside_a_longer_one_counts_when_it_is_long_enough_and_never_across_two():
    long = "How many squares fit into the rectangle of the figure?"
    problems = [{"id": "a", "problem": long}, {"id": "b", "problem": "Find x."},
                {"id": "c", "problem": f"{long} And more?"}]
    training = {benchmarks.plain(p) for p in (f"{long} Answer as an integer.", "Find x. And y.", "And more?")}
    assert benchmarks.overlap(problems, training) == {"equal": [], "contained": ["a"]}
    assert benchmarks.overlap(problems, training | {benchmarks.plain("Find x.")}) == {
        "equal": ["b"], "contained": ["a", "b"]}


def test_the_papers_average_is_over_its_four_sets():
    names = ["math500", "minerva", "aime24", "amc23", "aime25", "olympiadbench"]
    results = [{"model": "m", "data": d, "pass": {"1": i / 10}, "interval": {"1": (0, 1)}} for i, d in enumerate(names)]
    header, _, row = evaluation.table(results, [1]).splitlines()
    assert header.endswith("| olympiadbench @1 | paper's avg @1 |") and row.endswith("| 22.50 |")  # (0 + 2 + 3 + 4) / 4
    four = [r for r in results if r["data"] in benchmarks.PAPER_AVERAGE]
    header, _, row = evaluation.table(four, [1]).splitlines()
    assert header.endswith("| aime25 @1 | avg @1 |") and row.endswith("| 22.50 |")
