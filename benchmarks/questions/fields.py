"""Functions that are no perceptrons; stencils in float64, too."""

from functools import partial

from benchmarks.cases import Question
from benchmarks.contestants.functions import AUTO, case
from benchmarks.problems import formulas
from benchmarks.problems.functions import DOUBLE, SINGLE, Function, portable
from benchmarks.questions.crossover import WANTED

MAPS: tuple[tuple[str, int, int, Function], ...] = (
    ("stencil, 256 → 256", 256, 256, Function(partial(formulas.stencil, 256))),
    ("stencil, 2048 → 2048", 2048, 2048, Function(partial(formulas.stencil, 2048))),
    ("heat, 8² → 8²", 64, 64, Function(partial(formulas.heat, 8))),
    ("heat, 32² → 32²", 1024, 1024, Function(partial(formulas.heat, 32))),
    ("orbit, 4 → 4, 20 steps", 4, 4, portable(partial(formulas.orbit, 20))),
    ("attention, 4 × 8 → 4 × 8", 32, 32, Function(partial(formulas.attention, 4, 8))),
    ("attention, 16 × 32 → 16 × 32", 512, 512, Function(partial(formulas.attention, 16, 32))),
    ("cnn, 16² → 16²", 256, 256, Function(partial(formulas.image_to_image, 16, 4))),
    ("cnn, 32² → 10", 1024, 10, Function(partial(formulas.classifier, 32))),
    ("energy, 4096 → 1", 4096, 1, portable(partial(formulas.energy, 4096))),
    ("curve, 1 → 4096", 1, 4096, portable(partial(formulas.curve, 4096))),
)

QUICK = (MAPS[0][0], SINGLE)
QUESTION = Question(
    "fields",
    "Which way for maps that are as large out as in, and for programs of many small steps?",
    AUTO,
    tuple(
        case(name, function, sizes, dtype, wanted=WANTED, is_quick=is_quick)
        for name, n, m, function in MAPS
        for dtype in ((SINGLE, DOUBLE) if name.startswith("stencil") else (SINGLE,))
        for sizes, is_quick in [({"inputs": n, "outputs": m}, (name, dtype) == QUICK)]
    ),
)
