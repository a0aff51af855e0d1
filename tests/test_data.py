"""recipes/get_data.py against a hub on loopback: every layout, what can go wrong on the way, and the overlap."""
import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, WRAPPER, read
from huggingface_hub import constants

from helpers import common
from recipes import get_data
from recipes.get_data import Source

LINES = [{"question": f"What is {i} plus {i}, please?", "answer": 2.0 * i} for i in range(3)]
EXPECTED = [{"id": f"one-{i}", "problem": r["question"], "answer": str(r["answer"])} for i, r in enumerate(LINES, 1)]
ONE = "/datasets/org/one/resolve/main/test.jsonl"
TABLE = {"one": Source("org/one", "test.jsonl", "question", "answer", 3, get_data.digest(EXPECTED)),
         "two": Source("org/two", "data/two.parquet", "prompt", "final_answer", 2, None)}


def jsonl(rows: list[dict]) -> bytes:
    return "".join(map(common.to_line, rows)).encode()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on loopback: files is {path: bytes, an HTTP status, seconds before it answers, or (bytes, how many more it
    promises)}; asked, the paths it was asked for; env, the variables that lead to it."""
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            asked.append(self.path)
            found = files.get(self.path, 404)
            if isinstance(found, float):
                time.sleep(found)
            body, more = found if isinstance(found, tuple) else (found, 0)
            if isinstance(body, bytes):
                self.send_response(200)
                headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "Content-Length": len(body) + more}
            else:
                self.send_response(int(body))
                headers = {"X-Error-Code": {403: "GatedRepo", 404: "EntryNotFound"}.get(body, "")}
            for key, value in (headers | {"X-Repo-Commit": "0" * 40}).items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET" and isinstance(body, bytes):
                self.wfile.write(body)

        do_HEAD = do_GET

    files, asked = {ONE: jsonl(LINES)}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in {"HF_HUB_OFFLINE": False, "ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "home/hub"),
                        "HUGGINGFACE_CO_URL_TEMPLATE": f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
                        "HF_HUB_DOWNLOAD_TIMEOUT": 1}.items():
        monkeypatch.setattr(constants, name, value)
    yield argparse.Namespace(files=files, asked=asked, out=tmp_path / "data", env={
        "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"})
    server.shutdown()
    server.server_close()


def test_a_set_is_fetched_once_and_read_as_every_stage_reads_it(hub):
    path = get_data.get("one", hub.out, table=TABLE)
    assert path == hub.out / "one.jsonl" and read(path) == EXPECTED
    asked = len(hub.asked)
    assert asked and get_data.get("one", hub.out, table=TABLE) == path  # the finished file
    path.unlink()
    assert read(get_data.get("one", hub.out, table=TABLE)) == EXPECTED  # the cache
    assert len(hub.asked) == asked
    path.write_text(path.read_text().replace("plus 1", "plus 5"))
    with pytest.raises(common.UserError, match=r"one: .*one\.jsonl: .*digest .*; remove it"):
        get_data.get("one", hub.out, table=TABLE)
    get_data.get("one", hub.out, unchecked=True, table=TABLE)


@pytest.mark.parametrize("found,message", [
    ("offline", "cannot be downloaded: HF_HUB_OFFLINE is set, and the file is not in the cache$"),
    (404, r"there is no such file \(404\)"), (403, r"access is refused \(403\): .*HF_TOKEN"),
    (401, r"access is refused \(401\)"), (500, "500"),
    (3.0, r"http://.* did not answer within 1 s \(HF_HUB_DOWNLOAD_TIMEOUT\)"),
    ((jsonl(LINES)[:-30], 30), "cannot be downloaded: "),
    (jsonl(LINES)[:-30], r"test\.jsonl:3: not JSON .*\(remove .* to download it again\)"),
    (jsonl(LINES[:2]), r"holds 2 problems instead of 3 \(remove "), (b"\n", "holds 0 problems instead of 3"),
    (jsonl(LINES).replace(b"plus 1", b"plus 5"), "its problems are not those known .*--unchecked"),
    *[(jsonl([*LINES[:2], row]), "record 3: 'question' or 'answer' is missing or empty") for row in (
        {"question": "a"}, {"question": "", "answer": 1}, {"question": "a", "answer": ["1", "2"]},
        {"question": "a", "answer": True})]])
def test_what_goes_wrong_names_set_repository_and_file_and_is_mended(hub, monkeypatch, capsys, found, message):
    hub.files[ONE], start = found, time.monotonic()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", found == "offline")
    with pytest.raises(common.UserError, match=rf"^one: test\.jsonl of org/one: .*{message}") as e:
        get_data.get("one", hub.out, table=TABLE)
    assert "\n" not in str(e.value) and not hub.out.exists() and time.monotonic() - start < 30
    assert capsys.readouterr() == ("", "")
    hub.files[ONE] = jsonl(LINES)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for path in re.findall(r"\(remove (.*) to download", str(e.value)):
        Path(path).unlink()
    assert read(get_data.get("one", hub.out, table=TABLE)) == EXPECTED


def test_parquet_is_read_with_pyarrow_or_says_that_it_is_missing(hub, tmp_path, monkeypatch):
    hub.files["/datasets/org/two/resolve/main/data/two.parquet"] = b"PAR1 torn"
    with monkeypatch.context() as without:
        without.setattr(get_data, "find_spec", lambda name: None)  # as if it were not installed
        with pytest.raises(common.UserError, match=r"^two: data/two\.parquet of org/two: parquet needs pyarrow"):
            get_data.get("two", hub.out, table=TABLE)
    assert not hub.asked
    parquet = pytest.importorskip("pyarrow.parquet", reason="optional: for sets that the hub has as parquet")
    import pyarrow
    with pytest.raises(common.UserError, match=r"two\.parquet is damaged .*remove .* to download it again"):
        get_data.get("two", hub.out, table=TABLE)
    rows = [{"prompt": WRAPPER.format("a"), "final_answer": ["1"], "image": None},
            {"prompt": "b", "final_answer": ["$2$, $3$"], "image": None}]
    for file, keys in {"good": ("prompt", "final_answer"), "other": ("prompt",)}.items():
        parquet.write_table(pyarrow.Table.from_pylist([{k: r[k] for k in keys} for r in rows]), tmp_path / "t")
        hub.files[f"/datasets/org/two/resolve/main/{file}.parquet"] = (tmp_path / "t").read_bytes()
    get = lambda file: get_data.get("two", hub.out, table={"two": TABLE["two"]._replace(file=file)})
    with pytest.raises(common.UserError, match=r"two: other\.parquet of org/two: .*final_answer"):
        get("other.parquet")
    assert read(get("good.parquet")) == [{"id": "two-1", "problem": "a", "answer": "1"},
                                         {"id": "two-2", "problem": "b", "answer": "$2$, $3$"}]


def test_the_answer_of_gsm8k_is_what_follows_its_solution():
    row = {"question": "How many?", "answer": "500+500=<<500+500=1000>>1000\n#### 1,000"}
    assert get_data.to_problem(row, get_data.TABLE["gsm8k"], "gsm8k-1") == {
        "id": "gsm8k-1", "problem": "How many?", "answer": "1,000"}


def test_the_script_and_a_model_by_id_follow_the_hubs_variables(hub, tmp_path, model_dir):
    """In processes of their own: huggingface_hub reads its variables when it is imported."""
    code = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import argparse, torch; from helpers import common; from recipes import get_data
table = {{"math500": get_data.Source("org/one", "test.jsonl", "question", "answer", 3, None)}}
common.run_script(lambda: get_data.get_args(["math500", "--out", sys.argv[1]]), lambda a: get_data.main(a, table))
args = argparse.Namespace(model="org/tiny", dtype="float32")
print(common.load_model(args, torch.device("cpu")).vocab)"""
    for file in os.listdir(model_dir):
        hub.files[f"/org/tiny/resolve/main/{file}"] = (model_dir / file).read_bytes()
    for out, offline in ((tmp_path / "a", "0"), (tmp_path / "b", "1")):
        done = subprocess.run([sys.executable, "-c", code, out], capture_output=True, text=True, timeout=120,
                              check=False, env=hub.env | {"HF_HUB_OFFLINE": offline})
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}/math500.jsonl: 3 problems\n150\n", "")
    assert read(tmp_path / "a/math500.jsonl") == read(tmp_path / "b/math500.jsonl")


@pytest.mark.parametrize("one,other,same", [
    ("Find $x$ if  $x^2\\,=4$.", "find \\(x\\) if\n\\(x^2 = 4\\)", True),
    (r"$\left(\dfrac12\right)$", r"$(\frac12)$", True),
    ("Find $x+1$", "Find $x-1$", True),  # what ignoring signs costs
    ("Find $x^2$", "Find $x^3$", False), (r"\text{cm}", r"\textbf{cm}", False), ("\u4e8c", "\u4e09", False)])
def test_what_counts_as_the_same_problem(one, other, same):
    assert (get_data.plain(one) == get_data.plain(other)) is same


def test_a_problem_inside_a_longer_one_counts_when_it_is_long_enough_and_never_across_two():
    long = "How many squares fit into the rectangle of the figure?"
    problems = [{"id": "a", "problem": long}, {"id": "b", "problem": "Find x."},
                {"id": "c", "problem": f"{long} And more?"}]
    training = {get_data.plain(p) for p in (f"{long} Answer as an integer.", "Find x. And y.", "And more?")}
    assert get_data.overlap(problems, training) == {"equal": [], "contained": ["a"]}
    assert get_data.overlap(problems, training | {get_data.plain("Find x.")}) == {
        "equal": ["b"], "contained": ["a", "b"]}


def test_overlap_with_a_training_file_is_printed_and_written(hub, tmp_path, capsys):
    wrapped = WRAPPER.format("what is $2$ plus $\\,2$, please")
    (tmp_path / "train.jsonl").write_bytes(jsonl([
        {"prompt": [{"role": "user", "content": wrapped}]},
        {"problem": "Say: what is 0 plus 0, please? As an integer."}]))
    args = get_data.get_args(["math500", "--out", str(hub.out), "--overlap", str(tmp_path / "train.jsonl")])
    get_data.main(args, {"math500": TABLE["one"]})
    assert capsys.readouterr().out.splitlines()[1] == (
        f"math500: of 3 problems 1 are in {tmp_path}/train.jsonl, and 1 with those inside a longer problem")
    assert json.loads((hub.out / "overlap.json").read_text()) == {"math500": {
        "equal": ["math500-3"], "contained": ["math500-3"]}}
    args.names, args.overlap = ["math500", "aime24"], "aime24"  # a set by name, which is not compared with itself
    get_data.main(args, {"math500": TABLE["one"], "aime24": TABLE["one"]})
    shared = json.loads((hub.out / "overlap.json").read_text())
    assert {name: len(found["equal"]) for name, found in shared.items()} == {"math500": 3}
    args.overlap = str(tmp_path / "nope.jsonl")
    with pytest.raises(FileNotFoundError, match=r"nope\.jsonl"):
        get_data.main(args, {"math500": TABLE["one"], "aime24": TABLE["one"]})
