"""experiments/real_model.py: its proxies of soundness, and its table on a folder that the stages made."""
import json

import pytest
from conftest import QUARTER, ROOT, here, stage, write_problems, write_verifier

from experiments import real_model
from experiments.benches import real


@pytest.mark.parametrize("text,found", [
    ("She has 3 + 4 = 7 eggs, 7*2=15.", [(7, True), (15, False)]),
    (r"\(16 \times 2 = \$32\) and 32 \div 0 = 5", [(32, True), (5, False)]),
    (r"49.50 + 67.50 + 126.00 = 243.00 and \frac{180}{5} = 36", [(243, True), (36, True)]),
    (r"2 + 3 * 4 = 14, 15 \text{ lb} - 1 \text{ lb} = 13 \text{ lb}", [(14, True), (13, False)]),
    (r"\frac{3 + 5}{2} = 4, 12 / \frac{1}{2} = 24, 3 + 1 = 5", [(5, False)]), ("$1,200 / 3 = $400.00", [(400, True)]),
    ("10 / 3 = 3.33", [(3.33, True)]), ("no equation = 4", [])])
def test_equations_are_found_and_checked(text, found):
    assert real_model.equations(text) == found


@pytest.mark.parametrize("text,answer,expected", [
    ("3+4=7, so \\boxed{7}", "7", (True, True)), ("3+4=8. 4+3=7 \\boxed{7}", "7", (False, True)),
    ("3+4=7, the answer is \\boxed{9}", "9", (True, False)), ("It is \\boxed{9}", "9", (False, False)),
    ("3+4=7", "\\frac12", (True, False))])
def test_a_sound_continuation_computes_its_answer(text, answer, expected):
    assert real_model.proxies(text, answer) == expected


def test_the_table_counts_what_the_stages_wrote(tmp_path, model_dir, capsys):
    flags = ["--model", model_dir, "--max-new-tokens", 12, "--verifier", write_verifier(tmp_path / "v.py", QUARTER)]
    stage("rollout.py", *flags, "--data", write_problems(tmp_path / "d.jsonl", 8), "-n", 2, "--out", tmp_path / "r")
    stage("rollout.py", *flags, "--data", tmp_path / "r" / "zero_hit.jsonl", "-n", 3, "--seed", 1,
          "--out", tmp_path / "arms" / "fresh")
    for arm, more in {"latentrevise": [], "noise": ["--vertices", "random"]}.items():
        stage("revise.py", *flags, "--rollouts", tmp_path / "r", "--attempts", 1, "--continuations", 3,
              "--revision-steps", 2, "--out", tmp_path / "arms" / arm, *more)
    here("experiments.real_model", tmp_path / "arms", "--model", model_dir)
    _, _, fresh, latentrevise, noise = (
        [c.strip() for c in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines())
    assert (fresh[0], latentrevise[0], noise[0]) == ("fresh", "latentrevise", "noise")
    prompts = fresh[1].split(",")[0].split("/")[1]
    assert all(x[1].split(",")[0].endswith(f"/{prompts}") and x[2].endswith(f" of {3 * int(prompts)}")
               for x in (fresh, latentrevise, noise))
    assert fresh[-2:] == ["-", "-"] and noise[-1] != "-" != latentrevise[-1]
    tokens = [int(x[5].replace(",", "")) for x in (fresh, latentrevise, noise)]
    assert tokens[1] > max(tokens[0], tokens[2])  # noise takes no pass


def test_bench_of_a_real_model_measures_what_it_says(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(real, "SAMPLES", 1)
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"problem": f"1{i}+4?", "answer": f"1{4 + i}"}) + "\n" for i in range(8)))
    here("experiments.bench", "real", "--model", ROOT / "toy/sums_model", "--data", data, "--runs", 1, "--dtype",
         "float32")
    step, sampling = map(json.loads, capsys.readouterr().out.splitlines())
    assert (step["measure"], sampling["measure"], sampling["rows"]) == ("real_step", "real_sampling", 8)
    assert step["ratio"] == pytest.approx(step["reference"] / step["ours"], abs=1e-3)
    assert 0 < sampling["gflops"] and 0 < sampling["share_of_products"] < 1
