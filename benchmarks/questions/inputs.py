"""Jacobians of each sample in the inputs of a network."""

from benchmarks.cases import BEST, Case, Question, Wanted, best
from benchmarks.contestants.by_hand import ONE_GRAPH
from benchmarks.contestants.per_sample import FORWARD, INPUTS, LOOP, OURS, RECIPE
from benchmarks.problems.networks import RECURRENT, SMALL, case
from benchmarks.problems.refusing import ACTIVATIONS
from benchmarks.questions.params import COMPARED, EFFORT, FEW, MANY

# most samples with which forward mode, a tangent a pixel, keeps to seconds and to a gigabyte
PIXELWISE = {"mlp": MANY, "cnn": FEW, "transformer": FEW, "vit": FEW}
SHARES = {(SMALL, FEW): 0.75, (SMALL, MANY): 0.75, ("transformer", FEW): 0.6}  # of the recipe's
REFUSED = (RECURRENT, "lstm", *ACTIVATIONS)  # by vmap, and so by the recipe


def of_inputs(network: str, batch: int) -> Case:
    absent = () if batch <= PIXELWISE.get(network, 0) else FORWARD
    wanted: tuple[Wanted, ...] = ()
    if share := SHARES.get((network, batch)):
        wanted = Wanted(OURS, BEST, share, (RECIPE,)), best(OURS, batch, LOOP, ONE_GRAPH)
    return case(
        network,
        batch,
        tuple(contestant for contestant in INPUTS if contestant.name not in absent),
        wrt="inputs",
        baseline=RECIPE,
        effort=EFFORT,
        wanted=wanted,
        is_quick=batch == FEW and network == "resnet",
    )


def beside_loop(network: str) -> Case:
    """A network that vmap refuses, with a loop of as many pullbacks as there are classes."""
    some = tuple(c for c in INPUTS if c.name in (OURS, LOOP))
    wanted = (Wanted(OURS, BEST, 1.5, (LOOP,)),)
    return case(network, FEW, some, wrt="inputs", baseline=LOOP, effort=EFFORT, wanted=wanted)


QUESTION = Question(
    "inputs",
    "Per-sample Jacobians in the inputs of a network: by which way?",
    OURS,
    (
        *(of_inputs(network, batch) for network in (*COMPARED, SMALL) for batch in (FEW, MANY)),
        *map(beside_loop, REFUSED),
    ),
)
