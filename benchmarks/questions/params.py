"""Jacobians of each sample in the parameters of a network."""

from benchmarks.cases import Case, Question, Wanted
from benchmarks.contestants import per_sample as ways
from benchmarks.problems.networks import case
from jacfunc._measuring import Effort

FEW, MANY = 8, 64
COMPARED = ("mlp", "cnn", "resnet", "transformer", "vit")
FAST = ("mlp", "cnn", "transformer")  # networks of which a certain speed and peak is wanted
EFFORT = Effort(rounds=20, seconds=1.5, fewest=3, patience=15.0)


def of_params(network: str, batch: int) -> Case:
    """A case; of many samples without whoever sweeps a whole batch, for minutes a call."""
    absent = ways.WHOLE_BATCH, ways.TORCHJD, *(() if network in FAST else (ways.LAPLACE,))
    wanted = [
        Wanted(ways.OURS, "time ÷", 1.0, (ways.RECIPE,)),
        Wanted(ways.FLAT, "time ÷", 1.0, (ways.CONCATENATED,)),
        Wanted(ways.FLAT, "peak ÷", 0.6, (ways.CONCATENATED,)),
    ]
    if batch == MANY:
        names = ways.FLAT, ways.REUSED
        wanted += [Wanted(name, "times faster than", 10.0, (ways.LAPLACE,)) for name in names]
    return case(
        network,
        batch,
        tuple(c for c in ways.PARAMS if batch == FEW or c.name not in absent),
        baseline=ways.RECIPE,
        effort=EFFORT,
        wanted=tuple(wanted) if network in FAST else (),
        is_quick=batch == FEW and network in ("mlp", "cnn"),
    )


QUESTION = Question(
    "params",
    "Per-sample Jacobians in the parameters of a network: by which way, by which library?",
    ways.OURS,
    tuple(of_params(network, batch) for network in COMPARED for batch in (FEW, MANY)),
)
