"""The Jacobian of one call of a network in its parameters."""

from benchmarks.cases import Case, Question, best
from benchmarks.contestants.by_hand import FACTORS
from benchmarks.contestants.per_sample import ONE_CALL, OURS, WHOLE
from benchmarks.problems.networks import TINY, case
from benchmarks.questions.params import COMPARED, EFFORT

MOST = 256


def of_batch() -> Case:
    """Samples do not depend on each other: most of what one pulls back through all is zero."""
    some = tuple(c for c in WHOLE if c.name in (OURS, ONE_CALL, FACTORS))
    wanted = (best(OURS, MOST, ONE_CALL, FACTORS),)
    return case(TINY, MOST, some, per_sample=False, baseline=OURS, effort=EFFORT, wanted=wanted)


QUESTION = Question(
    "whole",
    "The Jacobian of one call of a network in its parameters: by which way, by which library?",
    OURS,
    (
        *(case(n, 1, WHOLE, per_sample=False, baseline=ONE_CALL, effort=EFFORT) for n in COMPARED),
        of_batch(),
    ),
)
