"""A step of stochastic reconfiguration: the damped solve that natural gradients need."""

from functools import partial

from benchmarks.cases import ANSWER, Case, Question, Wanted
from benchmarks.contestants.minsr import MINSR, OURS, RECIPE
from benchmarks.problems.wavefunction import PARAMETERS, judging, setup
from jacfunc._measuring import Effort

# through J it takes seconds, beside hundredths: once is enough
EFFORT = Effort(rounds=20, seconds=2.0, fewest=3, patience=2.0)


def step(samples: int, faster: float) -> Case:
    """A case that wants jacfunc so many times faster than J and a solve, without J in memory."""
    return Case(
        name=f"mlp of 296k, N={samples}",
        setup=partial(setup, samples),
        contestants=MINSR,
        check=judging,
        baseline=OURS,
        sizes={"batch": samples, "parameters": PARAMETERS, ANSWER: samples * PARAMETERS * 4},
        effort=EFFORT,
        wanted=(
            Wanted(OURS, "times faster than", faster, (RECIPE,)),
            Wanted(OURS, "peak ÷", 0.1, (ANSWER,)),
        ),
    )


QUESTION = Question(
    "minsr",
    "A step of natural gradients by samples (minSR): a damped solve with the centred Jacobian?",
    OURS,
    (step(128, faster=5), step(512, faster=20)),
)
