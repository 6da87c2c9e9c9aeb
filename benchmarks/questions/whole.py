"""The Jacobian of one call of a network in its parameters."""

from benchmarks.cases import Question
from benchmarks.contestants.per_sample import ONE_CALL, OURS, WHOLE
from benchmarks.problems.networks import case
from benchmarks.questions.params import COMPARED, EFFORT

QUESTION = Question(
    "whole",
    "The Jacobian of one call of a network in its parameters: by which way, by which library?",
    OURS,
    tuple(case(n, 1, WHOLE, per_sample=False, baseline=ONE_CALL, effort=EFFORT) for n in COMPARED),
)
