"""frontier.py: its base models, the control that it adds to GRPO, its commands, and its counts by hand."""
import random

import pytest
import torch
from conftest import parsed, read, write_problems, write_verifier
from safetensors.torch import load_file

import rollout
import train_grpo
from baselines import train_hint
from experiments import demo, frontier
from helpers import common
from toy import sums as toy
from toy import words as toy_words

FIRST = "17+5=12. So the answer is \\boxed{12}."
SOUND = "17+5=22. So the answer is \\boxed{22}."
JUMPS = "17+5=12. So the answer is \\boxed{22}."


@pytest.mark.parametrize("world", [toy, toy_words])
def test_shares_of_self_correction_and_of_mistakes_are_those_asked_for(world):
    def texts(**mix):
        rng = random.Random(3)
        return [toy.draw_example(world, rng, **mix) for _ in range(400)]

    of = {share: [t for m, t in texts(unasked=share, slip=0.0) if m.rstrip().endswith("?")] for share in (0.0, 1.0)}
    assert not any(map(world.has_reflection, of[0.0])) and all(map(world.has_reflection, of[1.0]))
    right = [world.is_sound(m, t) for m, t in texts(unasked=0.0, slip=0.0)]
    wrong = [world.is_sound(m, t) for m, t in texts(unasked=0.0, slip=1.0) if not world.has_reflection(t)
             and world.facts(m)[world.DIFFICULTY]]
    assert sum(right) > 0.9 * len(right) and not any(wrong)
    assert texts() == texts(unasked=toy.UNASKED, slip=world.FIRST_PASS[0])


def test_a_base_model_goes_on_from_another(tmp_path):
    argv = ["train", "--steps", "1", "--batch", "2", "--prompts", "0", "--start", "toy/sums_model"]
    for lr in ("0", "1e-3"):
        toy.main(toy.get_args([*argv, "--lr", lr, "--out", str(tmp_path / lr)]))
    start, same, other = (load_file(f / "model.safetensors") for f in (
        demo.ROOT / "toy/sums_model", tmp_path / "0", tmp_path / "1e-3"))
    assert all(torch.equal(v, same[k]) for k, v in start.items())
    assert not all(torch.equal(v, other[k]) for k, v in start.items())


def test_a_group_without_a_hit_is_rescued_by_a_hinted_response_as_if_it_had_no_hint(tmp_path, model_dir, monkeypatch):
    told = "def verify(response, gold):\n    return len(response) % 3 == 1\n"
    args = train_hint.get_args([*map(str, [
        "--model", model_dir, "--data", write_problems(tmp_path / "d.jsonl"), "--out", tmp_path / "o", "--device",
        "cpu", "--group-size", 3, "--max-new-tokens", 8, "--steps", 1, "--batch-size", 5, "--samples", 1, 0,
        "--verifier", write_verifier(tmp_path / "v.py", told), "--hint", "It is {answer}."])])
    prompts, sample = [], train_grpo.sample_groups

    def noting(policy, problems, *rest):
        prompts.append([policy.tokenizer.decode(p["prompt_ids"]) for p in problems])
        return sample(policy, problems, *rest)

    monkeypatch.setattr(train_grpo, "recover", None)  # what main replaces; put back after the test
    monkeypatch.setattr(train_grpo, "sample_groups", noting)
    train_hint.main(args)
    rows, (plain, hinted) = read(tmp_path / "o/samples.jsonl"), prompts
    injected = [r for r in rows if r["injected"]]
    assert injected and all(r["reward"] == 1 and r["prompt"] in plain for r in injected)
    assert len(rows) == 15 and len({r["id"] for r in injected}) == len(injected)
    zero = {r["id"] for r in rows} - {r["id"] for r in rows if r["reward"] and not r["injected"]}
    assert {r["id"] for r in injected} <= zero and len(hinted) == len(zero)
    numbers = [int(i[1:]) for i in zero]
    assert set(hinted) == {f"[user]{n}+{n}?\nIt is {2 * n}.\n{rollout.INSTRUCTION}[assistant]" for n in numbers}


def test_every_command_is_taken_by_its_stage(tmp_path, monkeypatch):
    commands, size = [], frontier.FULL | {"largest": 5}
    monkeypatch.setattr(demo, "run", lambda out, *found, processes=1: commands.extend(found))
    base = tmp_path / "rate0.003-seed0"
    rows = [{"id": i, "sample": s, "reward": int((i, s) in {("a", 40), ("b", 3)})} for i in "abc" for s in range(64)]
    for path, found in ((base / "measured/rollouts.jsonl", rows),
                        (tmp_path / "data0/hard.jsonl", [{"id": i, "problem": "1+1?", "answer": "2"} for i in "abc"])):
        path.parent.mkdir(parents=True)
        common.append_jsonl(path, found)
    bases = frontier.adapt(toy, tmp_path, {0: "toy/sums_model"}, [0.003], size)
    assert bases == {base: (0.003, 0)} and frontier.hit_rate(base) == (2, 192)
    # a hit in the first 32 decides; later ones only measure the rate
    assert {(r["id"], r["sample"]) for r in read(base / "rollouts/rollouts.jsonl")} == {
        (i, s) for i in "ac" for s in range(32)}
    assert [p["id"] for p in read(base / "rollouts/zero_hit.jsonl")] == ["a", "c"]
    for flags in frontier.TRAINING.values():
        if flags.endswith(".jsonl"):
            (base / "revise" / flags).parent.mkdir(parents=True, exist_ok=True)
            common.append_jsonl(base / "revise" / flags, [{"reward": 1}])
    frontier.recover(toy, tmp_path, bases, size, frontier.RECOVERY | frontier.LEARNED)
    frontier.train(toy, tmp_path, bases, size, list(frontier.TRAINING))
    assert len(commands) == 2 + 1 + len(frontier.RECOVERY | frontier.LEARNED) + len(frontier.TRAINING) + 1
    for script, args in map(parsed, commands):
        if "hint" in script and getattr(args, "start", "hint") == "hint":
            assert args.hint.replace("{answer}", "72") == " So the answer is \\boxed{72}. Check your work."


def test_counts_at_eight_tries_and_at_equal_tokens(tmp_path):
    base = tmp_path / "base"
    (base / "revise/fresh-samples").mkdir(parents=True)
    (base / "rollouts").mkdir()
    common.append_jsonl(base / "rollouts/zero_hit.jsonl", [{"id": i, "problem": "17+5?"} for i in "ab"])
    common.append_jsonl(base / "rollouts/rollouts.jsonl", [
        {"id": i, "sample": 0, "response_ids": [1] * 4} for i in "ab"])
    texts = {"a": [FIRST] * 8 + [SOUND] + [FIRST] * 3, "b": [JUMPS] + [FIRST] * 11}
    common.append_jsonl(base / "revise/fresh-samples/rollouts.jsonl", [
        {"id": i, "sample": s, "prompt_ids": [1] * 3, "response_ids": [1] * 5, "response": t, "finish": "eos",
         "reward": int("{22}" in t), "answer": "22"} for i in texts for s, t in enumerate(texts[i])])
    (base / "model").symlink_to(demo.ROOT / "toy/sums_model")
    base = frontier.Base(base)
    assert not base.complete("fresh samples")
    (base.folder / "revise/fresh-samples/summary.json").write_text("{}")
    assert base.complete("fresh samples")
    found = frontier.read(toy, base, 50.0, "fresh samples")
    assert found["8"] == (1, 0) and found["tokens"] == 8 * 5
    assert found["tries"] == 10 and found["equal"] == (2, 1) and found["sound_right"] == (1, 2)
    assert frontier.read(toy, base, 1e9, "fresh samples")["tries"] == 12  # all that there are
    assert frontier.read(toy, base, 1.0, "fresh samples")["equal"] == (0, 0)
    both = frontier.add([found, found])
    assert both["n"] == 4 and both["equal"] == (4, 2) and both["tries"] == 10
