"""controls.py against the definitions."""
import pytest

import revise
from helpers import controls


def test_permuted_answers_are_always_anothers():
    answers = {f"p{i}": str(i % 3) for i in range(20)}
    permuted = controls.permuted_answers(answers, seed=0)
    assert permuted.keys() == answers.keys() and all(permuted[i] != answers[i] for i in answers)
    assert permuted == controls.permuted_answers(dict(reversed(answers.items())), seed=0)


def test_adam_has_no_vertices_to_vary():
    args = revise.get_args(["--model", "m", "--rollouts", "r", "--out", "o", "--optimizer", "adam",
                            "--vertices", "random"])
    with pytest.raises(revise.UserError, match="--optimizer adam"):
        revise.check_revision_args(args)
