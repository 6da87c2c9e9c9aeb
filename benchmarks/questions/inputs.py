"""Jacobians of each sample in the inputs of a network."""

from benchmarks.cases import Case, Question
from benchmarks.contestants.per_sample import FORWARD, INPUTS, OURS, RECIPE
from benchmarks.problems.networks import case
from benchmarks.questions.params import COMPARED, EFFORT, FEW, MANY

# most samples with which forward mode, a tangent a pixel, keeps to seconds and to a gigabyte
PIXELWISE = {"mlp": MANY, "cnn": FEW, "transformer": FEW, "vit": FEW}


def of_inputs(network: str, batch: int) -> Case:
    absent = () if batch <= PIXELWISE.get(network, 0) else FORWARD
    return case(
        network,
        batch,
        tuple(contestant for contestant in INPUTS if contestant.name not in absent),
        wrt="inputs",
        baseline=RECIPE,
        effort=EFFORT,
        is_quick=batch == FEW and network == "resnet",
    )


QUESTION = Question(
    "inputs",
    "Per-sample Jacobians in the inputs of a network: by which way?",
    OURS,
    tuple(of_inputs(network, batch) for network in COMPARED for batch in (FEW, MANY)),
)
