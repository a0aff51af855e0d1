"""The paper's six test sets by short name, and what they share with a training file (paper Sec. 4.1); used by eval.py.

A set comes from the hub (`load(name)`) or from NAME.jsonl in a folder (`load(name, folder)`), in the hub's field names
or in ours (`problem`, `answer`). The number of problems is checked, so that a truncated or a different file is noticed.
"""
import hashlib
import json
import re
from pathlib import Path

import rollout
from helpers import common
from helpers.common import UserError

# Short name: hub id, file, its fields for problem and answer, problems. Ids, files, fields and counts were read in
# public listings and in other projects' loaders; nothing was downloaded to check them. Less sure than the rest: the
# fields of minerva and the file of olympiadbench, for which no listing was found, only loaders.
TABLE = {
    "math500": ("HuggingFaceH4/MATH-500", "test.jsonl", "problem", "answer", 500),
    "aime24": ("HuggingFaceH4/aime_2024", "data/train-00000-of-00001.parquet", "problem", "answer", 30),
    "aime25": ("math-ai/aime25", "test.jsonl", "problem", "answer", 30),
    "amc23": ("math-ai/amc23", "test-00000-of-00001.parquet", "question", "answer", 40),
    "minerva": ("math-ai/minervamath", "test.jsonl", "question", "answer", 272),
    "olympiadbench": ("Hothan/OlympiadBench", "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet",
                      "question", "final_answer", 674),
}
PAPER_AVERAGE = ("aime24", "aime25", "amc23", "math500")  # Tables 1 to 3: the sets that their avg is over
CONTAINED = 30  # letters and digits that a problem needs before finding it inside another one means something


def download(name: str) -> Path:
    """The file of a set in the local hub cache, fetched once. Raises UserError naming --benchmarks."""
    from huggingface_hub import hf_hub_download
    hub, file, *_ = TABLE[name]
    try:
        return Path(hf_hub_download(hub, file, repo_type="dataset"))
    except Exception as e:  # noqa: BLE001 (offline, no such file, refused: a dozen classes of three packages)
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UserError(f"--benchmarks {name}: {file} of {hub} cannot be downloaded ({reason}); with --benchmark-dir "
                        f"DIR it is read from DIR/{name}.jsonl") from None


def read_parquet(path: Path, name: str) -> list[dict]:
    """Rows of a parquet file. Raises UserError naming the package that is missing."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"--benchmarks {name}: {path.name} is parquet, which needs the package datasets "
                        f"(pip install datasets); with --benchmark-dir DIR it is read from DIR/{name}.jsonl") from None
    datasets.disable_progress_bars()
    try:
        return list(datasets.Dataset.from_parquet(str(path), columns=list(TABLE[name][2:4])))
    except Exception as e:  # noqa: BLE001 (damaged files and missing columns raise anything)
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UserError(f"{path}: cannot be read ({reason})") from None


def load(name: str, folder: str | None = None) -> list[dict]:
    """The problems of a set: `id` (NAME-1, NAME-2, ... in the order of the file), `problem`, `answer`.

    Raises UserError naming --benchmarks for an unknown name or a failed download, and the file for a wrong number of
    problems or one that lacks a field.
    """
    if name not in TABLE:
        raise UserError(f"--benchmarks {name}: not among {', '.join(TABLE)}")
    _, _, problem_key, answer_key, count = TABLE[name]
    path = Path(folder) / f"{name}.jsonl" if folder else download(name)
    records = read_parquet(path, name) if path.suffix == ".parquet" else common.read_jsonl(path)
    if len(records) != count:
        raise UserError(f"{path}: {name} has {count} problems, and this file {len(records)}")
    problems = []
    for number, r in enumerate(records, 1):
        problem, answer = r.get(problem_key, r.get("problem")), r.get(answer_key, r.get("answer"))
        if isinstance(answer, list) and len(answer) == 1:  # OlympiadBench: a list of one string
            answer = answer[0]
        if not (isinstance(problem, str) and problem.strip()
                and type(answer) in (str, int, float) and str(answer).strip()):
            raise UserError(f"{path}: record {number}: no {problem_key!r} and {answer_key!r}, or no 'problem' and "
                            "'answer', that are text")
        problems.append({"id": f"{name}-{number}", "problem": problem, "answer": str(answer)})
    return problems


def digest(problems: list[dict]) -> str:
    """The same for the same problems, whichever file they came from."""
    return hashlib.sha256(json.dumps(problems).encode()).hexdigest()[:16]


def plain(problem: str | list[dict]) -> str:
    """A problem as it is compared: lower case, without LaTeX's commands for space and size, then letters and digits
    alone. So signs are ignored, and two problems that differ in nothing else count as one."""
    text = problem if isinstance(problem, str) else "".join(m["content"] for m in problem)
    text = re.sub(r"\\(?:left|right|q?quad|displaystyle|text|mathrm)(?![a-z])|\\[dt](?=frac)", "", text.lower())
    return "".join(ch for ch in text if ch.isalnum())


def read_training(path: str, problem_key: str) -> set[str]:
    """The problems of a training file, plain and without DAPO's wrapper,
    from the field problem_key or DAPO's `prompt`."""
    found = set()
    for number, r in enumerate(common.read_jsonl(path), 1):
        where = f"{path}: record {number}"
        found.add(plain(rollout.clean_problem(r.get(problem_key, r.get("prompt")), where)))
    return found


def overlap(problems: list[dict], training: set[str]) -> dict[str, list[str]]:
    """Ids of the test problems that are a training problem (`equal`), and of those that are one or stand inside a
    longer one (`contained`): DAPO appends how to give the answer as an integer."""
    everything = "\n".join(training)
    texts = {p["id"]: plain(p["problem"]) for p in problems}
    equal = [i for i, text in texts.items() if text in training]
    inside = [i for i, text in texts.items() if len(text) >= CONTAINED and text in everything]
    return {"equal": equal, "contained": [i for i in texts if i in {*equal, *inside}]}
