"""The layout that a reader relies on: what is edited to change the method is six files, and imports go one way."""
import ast

import pytest
from conftest import ROOT

STAGES = ["eval", "revise", "rollout", "train_grpo", "train_sft", "verifier"]


def imported(path) -> set[str]:
    """The first names of what a file imports, and `folder.module` of what it takes from one of ours."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_the_top_level_is_the_six_stages():
    """A newcomer sees what the method is made of, and no more; another script goes into a folder."""
    assert sorted(p.stem for p in ROOT.glob("*.py")) == STAGES


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *(ROOT / "helpers").glob("*.py")], ids=lambda p: p.name)
def test_stages_and_helpers_stand_without_experiments_worlds_and_baselines(path):
    """A fork copies six files and helpers/."""
    assert not imported(path) & {"experiments", "toy", "baselines", "tests"}


@pytest.mark.parametrize("path", sorted((ROOT / "helpers").glob("*.py")), ids=lambda p: p.name)
def test_helpers_know_no_stage(path):
    """Otherwise nobody can read a helper alone."""
    assert not imported(path) & set(STAGES)
