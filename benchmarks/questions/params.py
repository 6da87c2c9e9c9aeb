"""Jacobians of each sample in the parameters of a network."""

from typing import Any

import torch

from benchmarks.cases import Case, Question, Wanted, best
from benchmarks.contestants import by_hand as hand
from benchmarks.contestants import per_sample as ways
from benchmarks.problems.networks import LENET, SMALL, case
from jacfunc._measuring import Effort

ONE, FEW, MANY = 1, 8, 64
COMPARED = ("mlp", "cnn", "resnet", "transformer", "vit")
BY_HAND = (SMALL, LENET, "groupnorm", "gpt", "lstm")
FAST = ("mlp", "cnn", "transformer")  # networks of which a certain speed and peak is wanted
EFFORT = Effort(rounds=20, seconds=1.5, fewest=3, patience=15.0)


def of_params(network: str, batch: int) -> Case:
    """A case; of many samples without whoever sweeps a whole batch, for minutes a call."""
    absent = ways.TORCHJD, *(() if network in FAST else (ways.LAPLACE,))
    wanted = [
        Wanted(ways.OURS, "time ÷", 1.0, (ways.RECIPE,)),
        Wanted(ways.FLAT, "time ÷", 1.0, (ways.CONCATENATED,)),
        Wanted(ways.FLAT, "peak ÷", 0.6, (ways.CONCATENATED,)),
    ]
    if batch == MANY:
        names = ways.FLAT, ways.REUSED
        wanted += [Wanted(name, "times faster than", 10.0, (ways.LAPLACE,)) for name in names]
    wanted = wanted if network in FAST else []
    if (network, batch) == ("vit", FEW):
        wanted = [best(ways.OURS, batch, ways.RECIPE, hand.FACTORS)]
    return case(
        network,
        batch,
        tuple(c for c in ways.PARAMS if batch == FEW or c.name not in absent),
        baseline=ways.RECIPE,
        effort=EFFORT,
        wanted=tuple(wanted),
        is_quick=batch == FEW and network in ("mlp", "cnn"),
    )


def by_hand(network: str, batch: int, **options: Any) -> Case:
    """A small network, where what is not arithmetic tells, beside the best by hand."""
    names = [ways.RECIPE, hand.FACTORS, *([hand.ROWS] if batch == ONE else [])]
    names += [hand.IN_FLOAT32] if options.get("dtype") == torch.float16 else []
    some = tuple(c for c in (*ways.PARAMS, hand.HALF) if c.name in (ways.OURS, *names))
    options |= {
        "baseline": ways.OURS,
        "effort": EFFORT,
        "wanted": (best(ways.OURS, batch, *names),),
    }
    return case(network, batch, some, **options)


QUESTION = Question(
    "params",
    "Per-sample Jacobians in the parameters of a network: by which way, by which library?",
    ways.OURS,
    (
        *(of_params(network, batch) for network in COMPARED for batch in (FEW, MANY)),
        *(by_hand(network, batch) for network in BY_HAND for batch in (ONE, FEW)),
        *(by_hand(network, MANY) for network in (SMALL, "groupnorm")),
        by_hand("vit", ONE),
        *(by_hand(network, FEW, dtype=torch.float16) for network in (SMALL, "groupnorm")),
        by_hand(SMALL, MANY, threads=2),
    ),
)
