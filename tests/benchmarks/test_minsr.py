"""The question about steps of minSR: everyone is right, and who is spoken of is there."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import ANSWER
from benchmarks.contestants.minsr import MINSR
from benchmarks.problems.wavefunction import PARAMETERS, Sampled, judging, setup
from benchmarks.questions.minsr import QUESTION
from jacfunc._measuring import Check


@pytest.fixture(scope="module")
def judged() -> tuple[Sampled, Check]:
    problem = setup(24, torch.device("cpu"))
    return problem, judging(problem)


@pytest.mark.parametrize("contestant", MINSR, ids=lambda contestant: contestant.name)
def test_everyone_is_right(contestant, judged) -> None:
    problem, check = judged
    assert check(contestant.prepare(problem)()) < 1e-3


def test_the_network_is_as_large_as_it_is_said_to_be(judged) -> None:
    assert sum(param.numel() for param in judged[0].model.parameters()) == PARAMETERS


def test_everyone_who_is_spoken_of_takes_part() -> None:
    for case in QUESTION.cases:
        names = {contestant.name for contestant in case.contestants}
        assert {QUESTION.ours, case.baseline} <= names
        for wanted in case.wanted:
            assert {wanted.of, *wanted.others} <= names | {ANSWER}
