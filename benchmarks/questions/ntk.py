"""Neural tangent kernels of a batch with itself."""

from benchmarks.cases import ANSWER, Case, Question, Wanted, best
from benchmarks.contestants.by_hand import FACTORS
from benchmarks.contestants.kernels import KERNELS, MATMUL, OURS, TORCHJD, expected
from benchmarks.problems.networks import LARGE, LENET, RECURRENT, SHORT, SMALL, case
from jacfunc._measuring import Effort

# through J it takes up to ten seconds, beside hundredths: once is enough
EFFORT = Effort(rounds=20, seconds=2.0, fewest=3, patience=5.0)
FEW, MANY = 8, 64


def kernel(network: str, batch: int, faster: float = 0, peak: float = 0) -> Case:
    """A case that wants jacfunc so many times faster than the recipe, in a share of J's bytes."""
    wanted = [Wanted(OURS, "times faster than", faster, (MATMUL,))] if faster else []
    wanted += [Wanted(OURS, "times faster than", 1.0, (TORCHJD,))] if faster else []
    wanted += [Wanted(OURS, "peak ÷", peak, (ANSWER,))] if peak else []
    wanted += [best(OURS, batch, MATMUL, FACTORS)] if network == LENET else []
    return case(
        network,
        batch,
        KERNELS,
        expected,
        baseline=OURS,
        effort=EFFORT,
        wanted=tuple(wanted),
        is_quick=(network, batch) == (LENET, FEW),
    )


def by_hand(network: str, batch: int) -> Case:
    """A small network, where what is not arithmetic tells, beside the best by hand."""
    some = tuple(c for c in KERNELS if c.name in (OURS, MATMUL, FACTORS))
    wanted = (best(OURS, batch, MATMUL, FACTORS),)
    return case(network, batch, some, expected, baseline=OURS, effort=EFFORT, wanted=wanted)


QUESTION = Question(
    "ntk",
    "Neural tangent kernels of a batch with itself: from the factors of layers, or through J?",
    OURS,
    (
        *(kernel(network, FEW) for network in (LARGE, LENET, "transformer")),
        kernel(LARGE, MANY, faster=200, peak=0.05),
        kernel(LENET, MANY, faster=8),
        kernel("transformer", MANY, faster=1, peak=0.4),
        kernel(SHORT, MANY, faster=1.2, peak=0.4),
        kernel(RECURRENT, MANY),
        *(by_hand(SMALL, batch) for batch in (1, FEW, MANY)),
        *(by_hand(network, FEW) for network in ("vit", "lstm")),
    ),
)
