"""The problem sets of the paper, from the Hugging Face hub, as the problems that every stage reads.

    python recipes/get_data.py dapo14k math500 aime24 aime25 amc23 --out data
    python recipes/get_data.py math500 aime24 aime25 amc23 minerva olympiadbench --overlap dapo14k

Writes  OUT/NAME.jsonl: `id` (NAME-1, NAME-2, ... in the order of the hub's file), `problem`,
        `answer`. With --overlap, OUT/overlap.json: ids of test problems that training holds.

A set that is in OUT is not fetched again, and a file in the hub's cache is not downloaded again.
HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean to huggingface_hub;
HF_HUB_DOWNLOAD_TIMEOUT is the number of seconds that the hub may take to answer. Sets that the hub
has as parquet need pyarrow. What the sets are, and how to bring your own: docs/data.md.
"""
import argparse
import hashlib
import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the stages are

from helpers import common
from helpers.common import UserError
from rollout import clean_problem


class Source(NamedTuple):
    """Where a problem set is on the hub."""
    repo: str
    file: str
    problem: str  # its field
    answer: str  # its field
    count: int  # problems
    digest: str | None  # of digest(problems); None: not known


# Files, fields and counts are those of the hub's pages and of other projects' loaders. Digests are
# of copies with the same origin; where the copy at hand may be worded otherwise, there is none.
TABLE = {
    "dapo14k": Source("open-r1/DAPO-Math-17k-Processed", "en/train-00000-of-00001.parquet",
                      "prompt", "solution", 14116, None),
    "math500": Source("HuggingFaceH4/MATH-500", "test.jsonl",
                      "problem", "answer", 500, "f5a60bf9aabf0a01"),
    "aime24": Source("HuggingFaceH4/aime_2024", "data/train-00000-of-00001.parquet",
                     "problem", "answer", 30, None),
    "aime25": Source("math-ai/aime25", "test.jsonl", "problem", "answer", 30, None),
    "amc23": Source("math-ai/amc23", "test-00000-of-00001.parquet",
                    "question", "answer", 40, None),
    "minerva": Source("math-ai/minervamath", "test.jsonl",
                      "question", "answer", 272, "2c5fb80d8e5c43d0"),
    "olympiadbench": Source("Hothan/OlympiadBench",
                            "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet",
                            "question", "final_answer", 674, "60fe0764149b0153"),
    "gsm8k": Source("openai/gsm8k", "main/test-00000-of-00001.parquet",
                    "question", "answer", 1319, "ec29c9ce288d4012"),
}
CONTAINED = 30  # letters and digits: a shorter problem is found inside others by chance


# --- from the hub ---------------------------------------------------------------------------------
def download(source: Source) -> Path:
    """The file in the hub's cache, fetched once. Raises UserError with the reason."""
    import huggingface_hub as hub
    from huggingface_hub import constants
    hub.utils.disable_progress_bars()
    hub.utils.logging.set_verbosity_error()
    where = {"repo_id": source.repo, "filename": source.file, "repo_type": "dataset"}
    cached = hub.try_to_load_from_cache(**where)
    if isinstance(cached, str):
        return Path(cached)
    try:
        # One request with a time limit: hf_hub_download tries for minutes to reach a hub that hangs
        hub.get_hf_file_metadata(hub.hf_hub_url(**where), timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        return Path(hub.hf_hub_download(**where))
    except Exception as e:  # noqa: BLE001 (offline, refused, cut off: classes of three packages)
        kinds = [kind.__name__ for kind in type(e).__mro__]
        status = getattr(getattr(e, "response", None), "status_code", None)
        if "OfflineModeIsEnabled" in kinds:
            reason = "HF_HUB_OFFLINE is set, and the file is not in the cache"
        elif status in (401, 403) or "GatedRepoError" in kinds:
            reason = f"access is refused ({status}): accept its terms on the hub, and set HF_TOKEN"
        elif status == 404:
            reason = "there is no such file (404)"
        elif any("Timeout" in kind for kind in kinds):
            reason = (f"{constants.ENDPOINT} did not answer within "
                      f"{constants.HF_HUB_DOWNLOAD_TIMEOUT} s (HF_HUB_DOWNLOAD_TIMEOUT)")
        else:
            first = (str(e).strip().splitlines() or [kinds[0]])[0]
            reason = f"{first} ({constants.ENDPOINT})"
        raise UserError(reason) from None


def read_rows(path: Path, source: Source) -> list[dict]:
    """Records of a JSONL or parquet file. Raises UserError."""
    if path.suffix != ".parquet":
        return common.read_jsonl(path)
    from pyarrow import parquet
    try:
        return parquet.read_table(path, columns=[source.problem, source.answer]).to_pylist()
    except (OSError, ValueError, KeyError) as e:  # as pyarrow's own are
        raise UserError(f"{path} is damaged ({str(e).strip().splitlines()[0]})") from None


def to_problem(row: dict, source: Source, key: str) -> dict:
    """A row of the hub as a problem. Raises UserError naming the row's number, the end of key."""
    answer = row.get(source.answer)
    if isinstance(answer, list) and len(answer) == 1:  # OlympiadBench: a list of one string
        answer = answer[0]
    if isinstance(answer, str) and "####" in answer:  # GSM8K: a solution, then `#### 1,000`
        answer = answer.rpartition("####")[2].strip()
    problem, where = row.get(source.problem), f"record {key.rpartition('-')[2]}"
    if type(answer) not in (str, int, float) or not str(answer).strip() or not problem:
        raise UserError(f"{where}: {source.problem!r} or {source.answer!r} is missing or empty")
    return {"id": key, "problem": clean_problem(problem, where), "answer": str(answer)}


def check(problems: list[dict], source: Source, unchecked: bool) -> None:
    """Raises UserError unless the number of problems and their digest are those of the table."""
    if len(problems) != source.count:
        raise UserError(f"holds {len(problems)} problems instead of {source.count}")
    if not unchecked and source.digest not in (None, digest(problems)):
        raise UserError(f"its problems are not those known (digest {digest(problems)} instead of "
                        f"{source.digest}); --unchecked takes them")


def get(name: str, out: Path, unchecked: bool = False, table: dict[str, Source] = TABLE) -> Path:
    """OUT/NAME.jsonl, made unless it is there. Raises UserError naming the set and the file."""
    source, final = table[name], out / f"{name}.jsonl"
    if final.exists():
        try:
            check(common.read_jsonl(final, ("id", "problem", "answer")), source, unchecked)
        except UserError as e:
            raise UserError(f"{name}: {final}: {e}; remove it, and it is made again") from None
        return final
    where = f"{name}: {source.file} of {source.repo}"
    if source.file.endswith(".parquet") and not find_spec("pyarrow"):
        raise UserError(f"{where}: parquet needs pyarrow (pip install pyarrow)")
    try:
        cached = download(source)
    except UserError as e:
        raise UserError(f"{where}: cannot be downloaded: {e}") from None
    try:
        rows = read_rows(cached, source)
        problems = [to_problem(row, source, f"{name}-{i}") for i, row in enumerate(rows, 1)]
        check(problems, source, unchecked)
    except UserError as e:
        raise UserError(f"{where}: {e} (remove {cached.resolve()} to download it again)") from None
    out.mkdir(parents=True, exist_ok=True)
    common.write_atomic(final, "".join(map(common.to_line, problems)))
    return final


# --- what is compared -----------------------------------------------------------------------------
def plain(problem: str | list[dict]) -> str:
    """A problem as it is compared: lower case, without LaTeX's commands for space and size, then
    letters and digits alone. So signs are ignored: problems that differ in them count as one."""
    text = problem if isinstance(problem, str) else "".join(m["content"] for m in problem)
    layout = r"\\(?:left|right|q?quad|displaystyle|text|mathrm)(?![a-z])|\\[dt](?=frac)"
    return "".join(ch for ch in re.sub(layout, "", text.lower()) if ch.isalnum())


def digest(problems: list[dict]) -> str:
    """The same for the same problems in any order, whatever their ids, answers and spaces."""
    texts = "\n".join(sorted(plain(p["problem"]) for p in problems))
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


def read_training(path: Path) -> set[str]:
    """The problems of a training file, plain, from `problem` or DAPO's `prompt`."""
    return {plain(clean_problem(r.get("problem", r.get("prompt")), f"{path}: record {number}"))
            for number, r in enumerate(common.read_jsonl(path), 1)}


def overlap(problems: list[dict], training: set[str]) -> dict[str, list[str]]:
    """Ids of the test problems that are a training problem (`equal`), and of those that are one or
    stand inside a longer one (`contained`): DAPO appends how to give the answer as an integer."""
    everything = "\n".join(training)
    texts = {p["id"]: plain(p["problem"]) for p in problems}
    equal = [i for i, text in texts.items() if text in training]
    inside = [i for i, text in texts.items() if len(text) >= CONTAINED and text in everything]
    return {"equal": equal, "contained": [i for i in texts if i in {*equal, *inside}]}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=TABLE, help=", ".join(TABLE))
    parser.add_argument("--out", type=Path, default="data", help="output folder")
    parser.add_argument("--overlap", help="training file, or a NAME: count the test problems in it")
    parser.add_argument("--unchecked", action="store_true",
                        help="take problems that are as many as expected and not the same")
    return parser.parse_args(argv)


def main(args: argparse.Namespace, table: dict[str, Source] = TABLE) -> None:
    paths = {}
    for name in args.names:
        paths[name] = get(name, args.out, args.unchecked, table)
        print(f"{paths[name]}: {table[name].count} problems", flush=True)
    if not args.overlap:
        return
    train = Path(args.overlap)
    if args.overlap in table:
        train = get(args.overlap, args.out, args.unchecked, table)
    training, shared = read_training(train), {}
    for name in [n for n in args.names if n != args.overlap]:
        shared[name] = found = overlap(common.read_jsonl(paths[name]), training)
        print(f"{name}: of {table[name].count} problems {len(found['equal'])} are in {train}, and "
              f"{len(found['contained'])} with those inside a longer problem")
    common.write_atomic(args.out / "overlap.json", json.dumps(shared, indent=1) + "\n")


if __name__ == "__main__":
    common.run_script(get_args, main)
