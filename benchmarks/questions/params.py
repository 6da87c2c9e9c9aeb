"""Jacobians of each sample in the parameters of a network."""

from benchmarks.cases import Case, Question, Wanted
from benchmarks.contestants.per_sample import (
    CONCATENATED,
    FLAT,
    LAPLACE,
    OURS,
    PARAMS,
    RECIPE,
    REUSED,
    TORCHJD,
    WHOLE_BATCH,
)  # fmt: skip
from benchmarks.problems.networks import case
from jacfunc._measuring import Effort

FEW, MANY = 8, 64
COMPARED = ("mlp", "cnn", "resnet", "transformer", "vit")
FAST = ("mlp", "cnn", "transformer")  # networks of which a certain speed and peak is wanted
EFFORT = Effort(rounds=20, seconds=1.5, fewest=3, patience=15.0)


def of_params(network: str, batch: int) -> Case:
    """With many samples, whoever sweeps a whole batch takes up to minutes a call."""
    absent = (WHOLE_BATCH, TORCHJD) if network in FAST else (WHOLE_BATCH, TORCHJD, LAPLACE)
    wanted = [
        Wanted(OURS, "time ÷", 1.0, (RECIPE,)),
        Wanted(FLAT, "time ÷", 1.0, (CONCATENATED,)),
        Wanted(FLAT, "peak ÷", 0.6, (CONCATENATED,)),
    ]
    if batch == MANY:
        wanted += [Wanted(n, "times faster than", 10.0, (LAPLACE,)) for n in (FLAT, REUSED)]
    return case(
        network,
        batch,
        tuple(c for c in PARAMS if batch == FEW or c.name not in absent),
        baseline=RECIPE,
        effort=EFFORT,
        wanted=tuple(wanted) if network in FAST else (),
        is_quick=batch == FEW and network in ("mlp", "cnn"),
    )


QUESTION = Question(
    "params",
    "Per-sample Jacobians in the parameters of a network: by which way, by which library?",
    OURS,
    tuple(of_params(network, batch) for network in COMPARED for batch in (FEW, MANY)),
)
