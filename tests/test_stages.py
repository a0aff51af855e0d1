"""revise.py as a script, its controls, and every problem format through rollout.py and eval.py."""
import json
import math
from argparse import Namespace

import pytest
import torch
from conftest import (
    QUARTER,
    TOKENS,
    WRAPPER,
    assert_same_files,
    common_tokens,
    here,
    read,
    save,
    stage,
    tiny_model,
    tiny_tokenizer,
    write_problems,
    write_verifier,
)

import revise
import rollout
from helpers import common, sampling

M = 2  # continuations: few, so that some failed rollouts are tried in vain


class World:
    """Rollouts of one model, and revise.py on them."""

    def __init__(self, path, model, saved):
        self.path, self.model_dir, self.model = path, saved, model
        self.W = model.get_input_embeddings().weight.detach()
        self.verifier = write_verifier(path / "v.py", QUARTER)
        stage("rollout.py", "--model", saved, "--data", write_problems(path / "d.jsonl", 12), "-n", 4,
              "--out", path / "rollouts", "--max-new-tokens", 14, "--verifier", self.verifier)
        self.rows = read(path / "rollouts" / "rollouts.jsonl")
        hit = {r["id"] for r in self.rows if r["reward"]}
        self.failed = [r for r in self.rows if r["id"] not in hit]

    def revise(self, out, *flags, start=stage, **how):
        """The records."""
        start("revise", "--model", self.model_dir, "--rollouts", self.path / "rollouts", "--verifier", self.verifier,
              "--revise-tokens", 240, "--max-new-tokens", 14, "--continuations", M, "--out", out, *flags, **how)
        return read(out / "revised.jsonl")

    def keys(self, r):
        return [sampling.row_key(0, r["id"], r["sample"], "revised", m) for m in range(M)]

    def assert_drawn_from(self, context, record):
        """The continuations are what `sample` draws after context, token ids or embeddings."""
        policy, limit = common.Policy(self.model, None, TOKENS, [1]), 14 - record["prefix_len"]
        samples = sampling.sample(policy, [context], [self.keys(record)], [limit])[0]
        for key, s, c in zip(self.keys(record), samples, record["continuations"], strict=True):
            common_tokens(self.model, context, key, s.ids, c["ids"], where=(record["id"], record["sample"]))


@pytest.fixture(scope="module")
def world(tmp_path_factory, model_dir):
    return World(tmp_path_factory.mktemp("world"), tiny_model("qwen2"), model_dir)


@pytest.fixture(scope="module")
def default(world):
    """The plain method: output folder, revised.jsonl, recovered.jsonl."""
    out = world.path / "default"
    return out, world.revise(out), read(out / "recovered.jsonl")


def by_place(records):
    return {(r["id"], r["sample"]): r for r in records}


def literal_verify(text):
    return ord(text[-1]) % 4 == 1 if text else False


# --- what the records say ---------------------------------------------------------------------------------------------
def test_sec35_recovered_trajectories_verify_when_decoded_again(world, default):
    _, records, recovered = default
    assert len(recovered) == sum(c["reward"] for r in records for c in r["continuations"]) > 0
    for t in recovered:
        failed = by_place(world.failed)[t["id"], t["sample"]]
        text = tiny_tokenizer().decode(t["response_ids"], skip_special_tokens=True)
        assert text == t["response"] and literal_verify(text) and t["reward"] == 1
        assert max(t["response_ids"]) < TOKENS and len(t["response_ids"]) <= 14
        assert t["prefix_len"] == math.floor(0.8 * len(failed["response_ids"]))
        assert t["prompt_ids"] == failed["prompt_ids"] and t["answer"] == failed["answer"]
        assert (t["response_ids"][-1] == 1) == (t["finish"] == "eos")


def test_sec3_records_hold_the_cut_and_replay_the_soft_prefix_that_was_decoded(world, default):
    for record in default[1]:
        ids = by_place(world.failed)[record["id"], record["sample"]]["response_ids"]
        n = math.floor(0.8 * len(ids))
        assert record["prefix_len"] == n and record["prefix_ids"] == ids[:n]
        assert len(record["losses"]) == len(record["gaps"]) == record["passes"] == 10
        assert len(record["vertices"]) == 10 and all(len(v) == n for v in record["vertices"])
        assert record["gammas"] == [0.1 * 2 / (i + 1) for i in range(1, 11)] and min(record["gaps"]) >= 0
        E = revise.replay(world.W, record)
        assert record["projected_ids"] == [int((world.W[:TOKENS] @ e).argmax()) for e in E]  # Eq. (8), brute force
        assert record["kept"] == sum(map(int.__eq__, record["prefix_ids"], record["projected_ids"])) / n
        world.assert_drawn_from(torch.cat([world.W[record["prompt_ids"]], E]), record)
        assert record["recovered"] == any(c["reward"] for c in record["continuations"])


def test_sec35_a_trajectory_counts_only_if_it_is_right_after_its_projection_too(tmp_path, world):
    """Here the whole text decides, so that changed prefix tokens can make a right continuation wrong."""
    even = write_verifier(
        tmp_path / "v.py", "def verify(response, gold):\n    return sum(map(ord, response)) % 2 == 0\n")
    records = world.revise(tmp_path / "o", "--verifier", even, "--gamma0", 0.5, "--continuations", 8, "--attempts", 1)
    found, tried = [], [(r, c) for r in records for c in r["continuations"]]
    for r, c in tried:
        soft, hard = (tiny_tokenizer().decode(p + c["ids"], skip_special_tokens=True)
                      for p in (r["prefix_ids"], r["projected_ids"]))
        right = [sum(map(ord, text)) % 2 == 0 for text in (soft, hard)]
        assert c["response"] == hard and (c["soft_reward"], c["reward"]) == (int(right[0]), int(all(right)))
        found.append(tuple(right))
    assert {*found} >= {(True, True), (True, False)} and {right for right, _ in found} == {True, False}
    assert len(read(tmp_path / "o" / "recovered.jsonl")) == found.count((True, True))


def test_failed_rollouts_of_a_prompt_are_tried_in_turn_until_one_is_recovered(world, default):
    tried, order = {}, {}
    for rows, groups in ((default[1], tried), (world.failed, order)):
        for r in rows:
            groups.setdefault(r["id"], []).append(r)
    assert list(tried) == list(order)  # every zero-hit prompt, in the order of the data
    for name, records in tried.items():
        assert [r["sample"] for r in records] == [r["sample"] for r in order[name]][:len(records)]
        assert not any(r["recovered"] for r in records[:-1])
        assert records[-1]["recovered"] or len(records) == len(order[name])
    assert max(map(len, tried.values())) > 1 and any(records[-1]["recovered"] for records in tried.values())
    assert json.loads((default[0] / "summary.json").read_text()) == {
        "zero_hit": len(order), "tried": len(default[1]), "skipped_too_short": 0,
        "recovered_prompts": len({r["id"] for r in default[1] if r["recovered"]}),
        "recovered_trajectories": len(default[2])}


# --- the same files however it is run ---------------------------------------------------------------------------------
@pytest.mark.parametrize("tokens", [1, 480])
def test_other_batch_sizes_give_the_same_records(tmp_path, world, default, tokens, monkeypatch):
    packed, pack = [], revise.pack
    monkeypatch.setattr(revise, "pack", lambda *args: packed.append(pack(*args)) or packed[-1])
    found = world.revise(tmp_path / "o", "--revise-tokens", tokens, start=here)
    assert all(p.ids.numel() <= tokens or len(p.ids) == 1 for p in packed) and packed
    mine, theirs, other = by_place(found), by_place(default[1]), set()  # prompts of which a draw fell on the other side
    for place in mine.keys() & theirs.keys():
        a, b = mine[place], theirs[place]
        x = torch.cat([world.W[b["prompt_ids"]], revise.replay(world.W, b)])
        for key, c, d in zip(world.keys(b), a["continuations"], b["continuations"]):
            common_tokens(world.model, x, key, c["ids"], d["ids"], where=place)
            other |= {a["id"]} if c["ids"] != d["ids"] else set()
    rest = lambda records: [r for r in records if r["id"] not in other]  # whose further attempts may differ as well
    for a, b in zip(rest(found), rest(default[1]), strict=True):
        for floats in ("losses", "gaps"):  # their last digits may differ
            x, y = torch.tensor(a.pop(floats)), torch.tensor(b[floats])
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        assert a == {k: v for k, v in b.items() if k not in ("losses", "gaps")}
    assert rest(read(tmp_path / "o" / "recovered.jsonl")) == rest(default[2]) and len(other) < 3


def test_two_processes_give_the_same_bytes(tmp_path, world, default):
    world.revise(tmp_path / "o", processes=2)
    assert_same_files(default[0], tmp_path / "o")


# --- controls and choices ---------------------------------------------------------------------------------------------
@pytest.fixture
def pairs(tmp_path, world, default):
    """A function of flags: the first attempt at every prompt with them, beside the plain method's."""
    def run(*flags):
        theirs = by_place(default[1])
        found = world.revise(tmp_path / "o", "--attempts", 1, *flags)
        assert [r["id"] for r in found] == list(dict.fromkeys(r["id"] for r in world.failed))
        return [(r, theirs[r["id"], r["sample"]]) for r in found]
    return run


def test_control_no_steps_continues_the_unrevised_tokens(world, pairs):
    for r, _ in pairs("--revision-steps", 0):
        assert r["losses"] == r["gaps"] == r["gammas"] == r["vertices"] == [] and r["passes"] == 0
        assert r["projected_ids"] == r["prefix_ids"] and r["kept"] == 1 and list(r["curve"]) == ["0"]
        world.assert_drawn_from(torch.tensor(r["prompt_ids"] + r["prefix_ids"]), r)


def test_control_random_vertices_take_the_same_steps_in_other_directions(pairs):
    for r, other in pairs("--vertices", "random"):
        assert r["gammas"] == other["gammas"] and r["losses"] == r["gaps"] == [] and r["passes"] == 0
        assert all(a != b for a, b in zip(r["vertices"], other["vertices"], strict=True))
        assert len({tuple(v) for v in r["vertices"]}) == 10 and max(map(max, r["vertices"])) < TOKENS


def test_control_permuted_gold_steers_elsewhere_and_scores_on_both(world, pairs):
    golds = {r["id"]: r["answer"] for r in world.rows}
    for r, other in pairs("--gold", "permuted"):
        assert r["answer"] == golds[r["id"]] != r["guide_answer"] and r["guide_answer"] in golds.values()
        (explore, guide, nll), theirs = r["losses"][0], other["losses"][0]
        assert [explore, nll] == pytest.approx([theirs[0], theirs[2]], rel=1e-4)
        assert guide != pytest.approx(theirs[1], rel=1e-4)
        assert all(c["guide_reward"] == literal_verify(c["response"]) for c in r["continuations"])
    by_problem = Namespace(submit=lambda _, answer, problem: Namespace(result=lambda: problem["answer"] == answer))
    assert revise.verdicts([""], {"answer": "2", "problem_fields": {"answer": "1"}}, by_problem) == [1]


def test_fig3_record_every_two_decodes_on_the_way(tmp_path, world, default):
    records = world.revise(tmp_path / "o", "--record-every", 2)
    assert [{**r, "curve": r["curve"]["10"]} for r in records] == [{**r, "curve": r["curve"]["10"]} for r in default[1]]
    for r in records:
        assert list(r["curve"]) == ["0", "2", "4", "6", "8", "10"]
        assert all(len(c["rewards"]) == len(c["ids"]) == M for c in r["curve"].values())
        assert r["curve"]["10"]["rewards"] == [c["soft_reward"] for c in r["continuations"]]


def test_mean_reduction_reports_sums_and_moves_elsewhere(pairs):
    found = pairs("--reduction", "mean")
    assert all(r["losses"][0] == pytest.approx(other["losses"][0], rel=1e-4) for r, other in found)
    assert any(r["vertices"] != other["vertices"] for r, other in found)


def test_min_logprob_keeps_what_is_likely_after_the_projected_prefix(tmp_path, world, default):
    def likely(r, c):
        ids = r["prompt_ids"] + r["projected_ids"]
        logp = world.model(torch.tensor([ids + c["ids"]])).logits[0, len(ids) - 1:-1].log_softmax(-1)
        return float(logp.detach().gather(1, torch.tensor(c["ids"])[:, None]).mean())

    right = sorted(likely(r, c) for r in default[1] for c in r["continuations"] if c["reward"])
    least = right[len(right) // 2] - 1e-4
    records = world.revise(tmp_path / "o", "--min-logprob", least)
    found = [(c, likely(r, c)) for r in records for c in r["continuations"] if "logprob" in c]
    assert all(c["logprob"] == pytest.approx(value, abs=1e-4) for c, value in found)
    assert all(c["reward"] == (c["logprob"] >= least) for c, _ in found) and len({c["reward"] for c, _ in found}) == 2
    assert len(read(tmp_path / "o" / "recovered.jsonl")) == sum(c["reward"] for c, _ in found)
    # what is dropped is not recovered: further rollouts of the prompt are tried
    assert len(records) > len(default[1])


def test_the_projection_and_rows_advised_for_real_models_equal_brute_force(world, pairs):
    """--vertex-rows text: neither <unk> nor end-of-sequence, of tokens 0 to 149."""
    W, found = world.W[2:TOKENS], pairs("--projection", "cosine", "--vertex-rows", "text", "--gamma0", 0.5)
    for r, _ in found:
        cosine = torch.nn.functional.cosine_similarity(revise.replay(world.W, r)[:, None], W[None], dim=-1)
        assert r["projected_ids"] == (2 + cosine.argmax(-1)).tolist()
        assert min(map(min, r["vertices"])) >= 2
    assert any(r["kept"] < 1 for r, _ in found)


def test_without_projection_a_moved_prefix_keeps_its_tokens(pairs):
    found = pairs("--projection", "none", "--gamma0", 0.5)  # by which cosine changes some, above
    assert all(len(r["gammas"]) == 10 and r["projected_ids"] == r["prefix_ids"] for r, _ in found)


@pytest.mark.parametrize("passes,tokens,zero,short", [(True, 4, 0, 0), (False, 1, 0, 10)],
                         ids=["no-failure", "one-token"])
def test_prompts_without_a_rollout_to_revise_leave_empty_files(
        tmp_path, model_dir, capsys, passes, tokens, zero, short):
    verifier = write_verifier(tmp_path / "v.py", f"def verify(response, gold):\n    return {passes}\n")
    flags = ["--model", model_dir, "--verifier", verifier]
    here("rollout", *flags, "--data", write_problems(tmp_path / "d.jsonl"), "-n", 2, "--max-new-tokens", tokens,
         "--out", tmp_path / "r")
    here("revise", *flags, "--rollouts", tmp_path / "r", "--out", tmp_path / "o")
    said = capsys.readouterr().out
    assert f"0 of {zero} zero-hit prompts" in said and f"{short} too short to cut" in said
    assert json.loads((tmp_path / "o" / "summary.json").read_text())["skipped_too_short"] == short
    assert (tmp_path / "o" / "revised.jsonl").read_text() == (tmp_path / "o" / "recovered.jsonl").read_text() == ""


def test_an_untied_qwen3_goes_through_every_stage(tmp_path):
    """Vertices are rows of the input embedding, not of the head."""
    model = tiny_model("qwen3", tied=False, seed=4)
    world = World(tmp_path, model, save(tmp_path / "model", model))
    for r in world.revise(tmp_path / "o"):
        assert r["projected_ids"] == (revise.replay(world.W, r) @ world.W[:TOKENS].T).argmax(-1).tolist()
    assert (tmp_path / "o" / "recovered.jsonl").read_text()
    sampled = ["--max-new-tokens", 10, "--verifier", world.verifier]
    here("train_sft", "--model", world.model_dir, "--data", tmp_path / "o" / "recovered.jsonl", "--steps", 2,
         "--batch-size", 4, "--out", tmp_path / "sft")
    here("train_grpo", "--model", tmp_path / "sft" / "model", "--data", tmp_path / "rollouts" / "zero_hit.jsonl",
         "--steps", 1, "--batch-size", 3, "--group-size", 4, "--revise", *sampled, "--out", tmp_path / "grpo")
    models = [world.model_dir, tmp_path / "grpo" / "model"]
    assert len(here("eval", "--model", *models, "--data", tmp_path / "d.jsonl", "-n", 2, "--k", 1, *sampled,
                    "--out", tmp_path / "eval")) == 2


# Rows shaped like the published files, in our own words: name -> (rows, flags, golds as the verifier gets them)
FORMATS = {
    "math500": ([{"problem": "Write $(0,3)$ in polar form.", "solution": "Easy.", "subject": "Precalculus", "level": 2,
                  "answer": r"\left( 3, \frac{\pi}{2} \right)", "unique_id": "test/a/1.json"},
                 {"problem": "Name it.\n[asy] draw(1); [/asy]", "answer": "p - q", "unique_id": "test/2.json"}],
                ["--fields", "unique_id", "problem", "answer"], [r"\left( 3, \frac{\pi}{2} \right)", "p - q"]),
    "aime24": ([{"ID": "2024-I-1", "Problem": "Find $n$.", "Solution": "It is 25.", "Answer": "025"},
                {"ID": "2024-I-2", "Problem": "Find $m$.", "Solution": "", "Answer": 7}],
               ["--fields", "ID", "Problem", "Answer"], ["025", "7"]),
    "aime25": ([{"question": "What is the angle?", "answer": r"336^\circ"}, {"question": "Sum?", "answer": "070"}],
               ["--fields", "id", "question", "answer"], [r"336^\circ", "070"]),
    "amc23": ([{"id": 0, "question": "How many?", "answer": 27.0}, {"id": 1, "question": "?", "answer": 36.0}],
              ["--fields", "id", "question", "answer"], ["27.0", "36.0"]),
    "minerva": ([{"question": "P?", "answer": "4.5e33"}, {"question": "B?", "answer": r"\frac{2 \pi}{c} \sqrt{I}"}],
                ["--fields", "id", "question", "answer"], ["4.5e33", r"\frac{2 \pi}{c} \sqrt{I}"]),
    "olympiadbench": ([{"id": 1606, "problem": "All?", "answer": "$(1,2),(2,1)$", "unit": None},
                       {"id": 1610, "problem": "All $n$?", "answer": r"$\frac{1}{2 n+2}$,$-1$", "context": None}],
                      [], ["$(1,2),(2,1)$", r"$\frac{1}{2 n+2}$,$-1$"]),
    "dapo": ([{"prompt": WRAPPER.format("How many?\n\nCount twice."), "solution": "34", "data_source": "math_dapo",
               "extra_info": {"index": "a-1"}, "reward_model": {"ground_truth": "34", "style": "rule"}},
              {"prompt": [{"role": "user", "content": WRAPPER.format("Which one?")}], "solution": "-5",
               "ability": "MATH"}],
             ["--fields", "id", "prompt", "solution"], ["34", "-5"]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_shaped_like_published_files_go_through_rollout_and_eval(tmp_path, model_dir, name):
    rows, flags, golds = FORMATS[name]
    (tmp_path / "d.jsonl").write_text("".join(map(common.to_line, rows)))
    flags = ["--model", model_dir, "--data", tmp_path / "d.jsonl", "-n", 2, "--max-new-tokens", 4, *flags]
    here("rollout", *flags, "--out", tmp_path / "r")
    assert here("eval", *flags, "--k", 1, 2, "--out", tmp_path / "e")[0]["problems"] == 2
    records = read(tmp_path / "r" / "rollouts.jsonl")
    assert [r["answer"] for r in records] == [g for g in golds for _ in range(2)]
    prompts = [tiny_tokenizer().decode(r["prompt_ids"]) for r in records]
    assert all(p.endswith(f"\n{rollout.INSTRUCTION}[assistant]") and "Answer:" not in p for p in prompts)
