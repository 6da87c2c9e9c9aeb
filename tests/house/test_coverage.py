"""Functions and modules as users write them × every transform: right, or refused with advice.

Judged by loops of ``torch.autograd.grad``, and these by finite differences. The last test holds
``docs/coverage.md``, where torch.func stands beside us, against what was found here:
``JACFUNC_WRITE_DOCS=1`` writes it anew.
"""

from __future__ import annotations

import difflib
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

import jacfunc
from tests.conftest import DEVICE
from tests.kinds import modules as module_kinds
from tests.kinds.applied import APPLIED_KINDS
from tests.kinds.arrays import ARRAY_KINDS
from tests.kinds.functions import FUNCTION_KINDS, FunctionKind
from tests.kinds.modules import MODULE_KINDS, ModuleKind
from tests.kinds.programs import PROGRAM_KINDS
from tests.kinds.science import SCIENCE_KINDS
from tests.truth.oracles import (
    assert_same,
    finite_differences,
    float_leaves,
    is_real_tensor,
    leaves_of,
    looped_hessian,
    looped_jacobian,
    place,
    tree_map,
)

# torch warns about beta features and deprecated operators, which are what is tried here
pytestmark = pytest.mark.filterwarnings("ignore")

DOCS = Path(__file__).parents[2] / "docs" / "coverage.md"
VERSION = torch.__version__.partition("+")[0]
TRANSFORMS = ("jacrev", "jacfwd", "hessian", "per sample")
FUNCTIONS = {
    kind.name: kind
    for kind in (*FUNCTION_KINDS, *PROGRAM_KINDS, *ARRAY_KINDS, *SCIENCE_KINDS, *APPLIED_KINDS)
}

# Modules that are not tried here, and why.
SKIPPED = {
    "parameters in a plain list": "the references here move the parameter alone, not its other "
    "place; tests/modules/test_module_kinds.py has it",
    "TransformerEncoderLayer dropout": "masks are drawn in the order of memory, which torch lays "
    "out another way in forward mode: another draw, which the reference can't judge",
}
# Modules whose gradient is meant to be another than that of their values, or whose precision
# leaves nothing to a difference: loops of autograd judge alone.
UNSURE = {
    *("spectral_norm train", "spectral_norm by hook", "vector quantization", "no_grad inside"),
    *("backward hook", "tensor hook", "fake quantization", "HingeEmbeddingLoss"),
    *("CosineEmbeddingLoss", "Embedding by frequency", "Embedding padding", "Embedding max norm"),
    *("EmbeddingBag padding", "autocast inside", "mixed dtypes", "Linear float32"),
    "Linear bfloat16",
}
MODULES = {kind.name: kind for kind in MODULE_KINDS if kind.name not in SKIPPED}
KINDS: dict[str, FunctionKind | ModuleKind] = {**FUNCTIONS, **MODULES}

# What is neither right nor refused with advice, or not right where torch.func is: to be mended.
# By reason, then by transform; each entry must still hold.
NOT_YET: dict[str, dict[str, str]] = {}
NOTHING_WORKS = {
    *("incomplete_gamma_by_order", "bessel_j", "chebyshev_polynomial"),
    *("CrossMapLRN2d", "checkpoint reentrant"),
}
"""Torch has no right derivative of these, by whatever strategy."""
COUPLED = "samples that do not depend on each other"
"""Refused where torch.func.vmap differentiates another function: each sample in a batch of one."""
SCRIPTED = {"TorchScript script", "TorchScript trace"}
"""Right at first, they may come out wrong once they are optimized, by what they then met."""

KNOWN = {
    (name, transform): reason
    for reason, cells in NOT_YET.items()
    for transform, names in cells.items()
    for name in names.split(", ")
}


class Case(NamedTuple):
    """A transform of a kind: ours, torch.func's ways to do it, the answer, how near to it."""

    ours: Callable[[], Any]
    theirs: tuple[Callable[[], Any], ...]
    want: Any
    rtol: float


# --- references ---

Reference = tuple[Any, float]  # the derivative, and the relative error that it has itself


def first_order(func: Callable[..., Any], args: Any, argnums: Any = 0, *, sure: bool) -> Reference:
    """By the loop; by differences of ``func`` where torch has no derivative, or a wrong one."""
    try:
        with torch.enable_grad():
            jac = looped_jacobian(func, args, argnums)
    except (NotImplementedError, RuntimeError):
        return finite_differences(func, contiguous(args), argnums), 1e-5
    if sure and not agrees(jac, func, args, argnums, step=1e-6):
        return finite_differences(func, contiguous(args), argnums), 1e-5
    return jac, 0.0


def second_order(
    func: Callable[..., Any], args: Any, argnums: Any = 0, *, sure: bool, doubted: bool = False
) -> Reference:
    """By two loops; by differences of the Jacobian where these fail.

    ``doubted``: the loop has been wrong at first order, so is no judge of the second.
    """

    def jacobian(*at: Any) -> Any:
        return first_order(func, at, argnums, sure=doubted)[0]

    try:
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels are differentiable once
            hess = looped_hessian(func, args, argnums)
    except (NotImplementedError, RuntimeError):
        hess = None
    if hess is None or (sure and not agrees(hess, jacobian, args, argnums, step=1e-5)):
        return finite_differences(jacobian, contiguous(args), argnums, step=1e-4), 1e-3
    return hess, 0.0


def agrees(derivative: Any, func: Callable[..., Any], args: Any, argnums: Any, step: float) -> bool:
    """Is the derivative along a random direction a difference of values?"""
    chosen = {argnums} if isinstance(argnums, int) else set(argnums)
    chosen = {n % len(args) for n in chosen}
    generator = torch.Generator().manual_seed(2)
    ways = [
        [torch.randn(x.shape, generator=generator).to(x) for x in float_leaves(arg)] for arg in args
    ]

    def at(shift: float) -> list[Tensor]:
        moved = [
            moved_by(arg, way, shift) if n in chosen else copied(arg)
            for n, (arg, way) in enumerate(zip(args, ways, strict=True))
        ]
        with torch.no_grad():
            return float_leaves(func(*moved))

    picked = [argnums] if isinstance(argnums, int) else argnums
    along = [direction for n in picked for direction in ways[n]]
    blocks = iter(float_leaves(derivative))
    for up, down in zip(at(step), at(-step), strict=True):
        pushed = sum(torch.tensordot(next(blocks), v.to(up), v.dim()) for v in along)
        slope = (up - down) / (2 * step)
        if not torch.allclose(pushed, slope, rtol=1e-4, atol=1e-5):
            return False
    return True


def moved_by(tree: Any, direction: list[Tensor], shift: float) -> Any:
    steps = iter(direction)
    return tree_map(lambda x: x.detach() + shift * next(steps) if is_real_tensor(x) else x, tree)


def copied(tree: Any) -> Any:
    return tree_map(lambda x: x.detach().clone() if is_real_tensor(x) else x, tree)


def contiguous(tree: Any) -> Any:
    return tree_map(lambda x: x.detach().contiguous() if is_real_tensor(x) else x, tree)


def reseed() -> None:
    """Of the CPU alone where that will do: torch.manual_seed costs more than a small Jacobian."""
    (torch.default_generator if DEVICE == "cpu" else torch).manual_seed(0)


def seeded(func: Callable[..., Any], state: Tensor | None = None) -> Callable[..., Any]:
    """``func``, drawing the same random numbers at each call."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if state is None:
            reseed()
        else:
            torch.set_rng_state(state)
        return func(*args, **kwargs)

    return run


# --- functions ---


def bound(kind: FunctionKind) -> Callable[..., Any]:
    """The function of its positional arguments, without aux."""

    def run(*args: Any) -> Any:
        output = kind.func(*args, **kind.kwargs)
        return output[0] if kind.has_aux else output

    return seeded(run)


def first_point(kind: FunctionKind) -> Any:
    return kind.make_args(DEVICE, torch.float64)


def second_point(kind: FunctionKind) -> Any:
    """Another sample: as the kind has it, or near by."""
    if kind.other:
        return kind.other(DEVICE, torch.float64)
    generator = torch.Generator().manual_seed(1)

    def moved(x: Tensor) -> Tensor:
        return x.detach() * (1 - 0.02 * torch.rand(x.shape, generator=generator).to(x))

    return tree_map(lambda x: moved(x) if is_real_tensor(x) else x, first_point(kind))


def stacked(*points: Any) -> Any:
    """Every tensor with the batch in front; what is no tensor as it is."""
    columns = zip(*map(leaves_of, points), strict=True)

    def stack(leaf: Any) -> Any:
        column = next(columns)
        return torch.stack(column).detach() if isinstance(leaf, Tensor) else leaf

    return tree_map(stack, points[0])


def stacked_blocks(jacobians: list[Any]) -> Any:
    blocks = zip(*map(float_leaves, jacobians), strict=True)
    return place(jacobians[0], [torch.stack(block) for block in blocks])


def function_cases(kind: FunctionKind) -> dict[str, Case]:
    func, sure = bound(kind), kind.unsure is None
    if kind.is_compiled:
        torch.compiler.reset()
    jac, error = first_order(func, first_point(kind), kind.argnums, sure=sure)
    hess, second_error = second_order(
        func, first_point(kind), kind.argnums, sure=sure, doubted=error > 0
    )
    other, _ = first_order(func, second_point(kind), kind.argnums, sure=sure)
    aux: dict[str, Any] = {"has_aux": True} if kind.has_aux else {}

    def derive(transform: Any, *args: Any) -> Any:
        if kind.is_compiled:
            torch.compiler.reset()
        result = transform(kind.func, kind.argnums, **aux)(*args, **kind.kwargs)
        return result[0] if kind.has_aux else result

    def call(transform: Any) -> Callable[[], Any]:
        return lambda: derive(transform, *first_point(kind))

    def mapped(vmap: Any, transform: Any) -> Callable[[], Any]:
        batched = vmap(partial(derive, transform))
        return lambda: batched(*stacked(first_point(kind), second_point(kind)))

    theirs = torch.func
    by_samples = mapped(torch.vmap, theirs.jacrev), mapped(torch.vmap, theirs.jacfwd)
    rtol = max(kind.rtol, error)
    return {
        "jacrev": Case(call(jacfunc.jacrev), (call(theirs.jacrev),), jac, rtol),
        "jacfwd": Case(call(jacfunc.jacfwd), (call(theirs.jacfwd),), jac, rtol),
        "hessian": Case(
            call(jacfunc.hessian), (call(theirs.hessian),), hess, max(kind.rtol, second_error)
        ),
        "per sample": Case(
            mapped(jacfunc.vmap, jacfunc.jacobian), by_samples, stacked_blocks([jac, other]), rtol
        ),
    }


# --- modules ---

ENTRIES = 8  # of parameters and inputs, that a Hessian is taken by


class Called:
    """A fresh module as a function ``(params, kwargs, *inputs)``, as torch.func takes it."""

    def __init__(self, kind: ModuleKind) -> None:
        self.module = kind.make()
        # torch does not call these with other parameters
        self.is_stateless = not isinstance(self.module, torch.jit.ScriptModule | nn.DataParallel)
        trained = {n: p.detach() for n, p in self.module.named_parameters() if p.requires_grad}
        self.params = trained if self.is_stateless else {}
        self.point = (self.params, kind.kwargs(), *kind.inputs())
        by_inputs = [n for n, arg in enumerate(self.point[2:], 2) if float_leaves(arg)]
        self.argnums = (*([0] if self.params else []), *by_inputs)
        self.wrt = (*(["params"] if self.params else []), *(["inputs"] if by_inputs else []))

    def __call__(self, params: Any, kwargs: Any, *inputs: Any) -> Any:
        if not self.is_stateless:
            return self.module(*inputs, **kwargs)
        rest = (*self.module.named_parameters(), *self.module.named_buffers())
        tensors = {name: x.detach().clone() for name, x in rest} | params
        return functional_call(self.module, tensors, inputs, kwargs)


class Owning(Called):
    """The same, with the parameters put into the module itself: for the reference.

    What is computed again later, by a checkpoint, finds them there.
    """

    def __call__(self, params: Any, kwargs: Any, *inputs: Any) -> Any:
        own = dict(self.module.named_parameters())
        moved = {id(own[name]): x for name, x in params.items()}
        for part in self.module.modules():
            for name, param in list(part._parameters.items()):
                if id(param) in moved:
                    part._parameters[name] = moved[id(param)]
        inputs = tree_map(lambda x: x.clone() if is_real_tensor(x) else x, inputs)
        return self.module(*inputs, **kwargs)


def fresh(kind: ModuleKind) -> Callable[..., Any]:
    """A module keeps state: here every call is the first."""
    return lambda *point: Owning(kind)(*point)


def of_one(func: Callable[..., Any]) -> Callable[..., Any]:
    """A module of batches, called with a single sample."""

    def run(params: Any, kwargs: Any, *inputs: Any) -> Any:
        kwargs, inputs = tree_map_only(Tensor, lambda x: x[None], (kwargs, inputs))
        return tree_map_only(Tensor, lambda y: y.squeeze(0), func(params, kwargs, *inputs))

    return run


def each_sample(kind: ModuleKind, sure: bool) -> Any:
    """Sample by sample, the random numbers drawn in that order; None where that is impossible."""
    called = Called(kind)
    params, *rest = called.point
    size = next(len(x) for x in leaves_of(rest) if isinstance(x, Tensor))
    reseed()
    found = []
    for b in range(size):
        at = tree_map(lambda x, b=b: x[b] if isinstance(x, Tensor) else x, rest)
        func = seeded(of_one(fresh(kind)), torch.get_rng_state())
        try:
            found.append(first_order(func, (params, *at), called.argnums, sure=sure)[0])
        except ValueError:  # batch normalization of a single sample
            return None
    return stacked_blocks(found)


def few_entries(kind: ModuleKind) -> tuple[Callable[..., Any], Tensor]:
    """``readout(call)`` is a smooth scalar of a call of the module, as a function of few entries.

    These are spread over all parameters and inputs.
    """
    called = Called(kind)
    point, argnums = called.point, called.argnums
    leaves = [x for n in argnums for x in float_leaves(point[n])]
    sizes = [x.numel() for x in leaves]
    every = torch.linspace(0, sum(sizes) - 1, ENTRIES).round().long().unique()
    flat = torch.cat([x.reshape(-1).double() for x in leaves])

    def readout(call: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        def run(entries: Tensor) -> Tensor:
            pieces = iter(flat.index_put((every,), entries).split(sizes))

            def moved(x: Any) -> Any:
                if not is_real_tensor(x):
                    return x
                return next(pieces).to(x.dtype, copy=True).view(x.shape)

            at = [tree_map(moved, x) if n in argnums else x for n, x in enumerate(point)]
            smooth = [out.double().sin().sum() for out in float_leaves(call(*at))]
            return sum(smooth, torch.zeros_like(flat[0]))

        return run

    return readout, flat[every]


def first_met(module: nn.Module) -> nn.Module:
    """Scripts of a class share what they were optimized by in this process: here it begins anew.

    What is traced shares nothing, and would be another from a file.
    """
    if isinstance(module, torch.jit.TracedModule):
        return module
    memory = io.BytesIO()
    torch.jit.save(module, memory)
    memory.seek(0)
    return torch.jit.load(memory)


def module_cases(kind: ModuleKind) -> dict[str, Case]:
    shape = Called(kind)
    readout, start = few_entries(kind)
    sure = kind.name not in UNSURE
    jac, error = first_order(seeded(fresh(kind)), shape.point, shape.argnums, sure=sure)
    hess, second_error = second_order(seeded(readout(fresh(kind))), (start,), sure=sure)
    wrt = shape.wrt if len(shape.wrt) > 1 else shape.wrt[0]

    def ours(**options: Any) -> Callable[[], Any]:
        def run() -> Any:
            derive = jacfunc.module_jacobian(kind.make(), wrt, **options)
            return derive(*kind.inputs(), **kind.kwargs())

        return run

    def theirs(transform: Any) -> Callable[[], Any]:
        called = Called(kind)
        if kind.name in SCRIPTED:
            called.module = first_met(called.module)
        return lambda: transform(called, called.argnums)(*called.point)

    def mapped(transform: Any) -> Callable[[], Any]:
        called = Called(kind)
        dims = tree_map(lambda x: 0 if isinstance(x, Tensor) else None, called.point[1:])
        derive = torch.vmap(transform(of_one(called), called.argnums), (None, *dims))
        return lambda: derive(*called.point)

    jacrev, jacfwd = torch.func.jacrev, torch.func.jacfwd
    # as ours draws by default; inside another vmap torch's attention crashes on it
    drawing = partial(jacfwd, randomness="same") if kind.is_random else jacfwd
    rtol = max(kind.rtol, error)
    return {
        "jacrev": Case(ours(strategy="reverse"), (theirs(jacrev),), jac, rtol),
        "jacfwd": Case(ours(strategy="forward"), (theirs(drawing),), jac, rtol),
        "hessian": Case(
            partial(jacfunc.hessian(readout(Called(kind))), start),
            (partial(torch.func.hessian(readout(Called(kind))), start),),
            hess,
            max(kind.rtol, 1e-8, second_error),
        ),
        "per sample": Case(
            ours(per_sample=True), (mapped(jacrev), mapped(jacfwd)), each_sample(kind, sure), rtol
        ),
    }


# --- verdicts ---

# An API's name, what must hold and what came; then what to do, in a sentence of its own.
ADVICE = re.compile(r"(jac\w+|hessian|vmap|module_jacobian): .+[.?!)`] [A-Z`].+", re.DOTALL)


class Cell(NamedTuple):
    """What came of a call: ``right``, ``wrong``, ``nan``, ``refused`` with advice, or ``error``."""

    verdict: str
    message: str = ""


def same_leaves(got: Any, case: Case) -> None:
    """Values and shapes in order: torch's trees and dtypes are its own, and so are modules'."""
    found, wanted = float_leaves(got), float_leaves(case.want)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=case.rtol, atol=case.rtol / 10)


def same_tree(got: Any, case: Case) -> None:
    assert_same(got, case.want, rtol=case.rtol, atol=case.rtol / 10)


def judged(compute: Callable[[], Any], compare: Callable[[Any, Case], None], case: Case) -> Cell:
    reseed()
    try:
        result = compute()
    except Exception as error:  # whatever comes is a verdict
        message = str(error)
        own = isinstance(error, NotImplementedError | TypeError | ValueError)
        return Cell("refused" if own and ADVICE.match(message) else "error", message)
    if case.want is None:
        return Cell("wrong", "there is no answer")
    try:
        compare(result, case)
    except AssertionError as difference:
        is_nan = any(block.isnan().any() for block in float_leaves(result))
        return Cell("nan" if is_nan else "wrong", str(difference))
    return Cell("right")


def by_torch(case: Case, is_scripted: bool = False) -> Cell:
    """Where the first way fails, the next; a wrong number stands."""
    for compute in case.theirs:
        cell = (in_all_calls if is_scripted else judged)(compute, same_leaves, case)
        if cell.verdict in ("right", "wrong", "nan"):
            return cell
    return Cell("error", cell.message)


def in_all_calls(
    compute: Callable[[], Any], compare: Callable[[Any, Case], None], case: Case
) -> Cell:
    """Right only if it is at first, later, and without grad mode."""
    cells = []
    for grad_mode in (True, True, True, False, False):
        with torch.set_grad_enabled(grad_mode):
            cells.append(judged(compute, compare, case))
    return next((cell for cell in cells if cell.verdict != "right"), cells[0])


@cache
def row(name: str) -> dict[str, tuple[Cell, Cell]]:
    """Ours and torch.func's cell of every transform."""
    kind = KINDS[name]
    is_function = isinstance(kind, FunctionKind)
    if is_function and isinstance(kind.func, torch.jit.ScriptFunction):
        # TorchScript compiles by what earlier calls showed, in this process and in any test
        kind.func._debug_flush_compilation_cache()
    # torch.compile switches these checks off for the rest of a process
    torch.distributions.Distribution.set_default_validate_args(True)
    cases = function_cases(kind) if is_function else module_cases(kind)
    compare = same_tree if is_function else same_leaves
    cells = {
        transform: (judged(case.ours, compare, case), by_torch(case, name in SCRIPTED))
        for transform, case in cases.items()
    }
    if is_function and kind.is_compiled:
        torch.compiler.reset()  # for the tests that follow
    return cells


def is_bad(ours: Cell, theirs: Cell) -> bool:
    """Neither right nor refused with advice; or not right where torch.func is."""
    return ours.verdict not in ("right", "refused") or (
        ours.verdict == "refused" and theirs.verdict == "right" and COUPLED not in ours.message
    )


@pytest.mark.parametrize("name", KINDS)
def test_every_cell_is_right_or_refused_with_advice(name: str) -> None:
    if name in MODULES and DEVICE != "cpu":
        pytest.skip("the modules of the table live on the CPU")
    bad = {
        transform: f"{transform}: {ours.verdict}, torch.func {theirs.verdict}. {ours.message}"
        for transform, (ours, theirs) in row(name).items()
        if is_bad(ours, theirs)
    }
    known = {
        transform: KNOWN[name, transform] for transform in TRANSFORMS if (name, transform) in KNOWN
    }
    assert not bad.keys() - known.keys(), "\n".join(bad.values())
    if "strategy='auto'" in row(name)["jacfwd"][0].message and name not in NOTHING_WORKS:
        assert row(name)["jacrev"][0].verdict == "right", "the advice does not help"
    assert DEVICE != "cpu" or not known.keys() - bad.keys(), "mended: take it out of NOT_YET"
    if known:
        pytest.xfail("; ".join(f"{transform}: {reason}" for transform, reason in known.items()))


def test_the_table_is_large() -> None:
    assert len(FUNCTIONS) >= 180
    assert len(KINDS) == len(FUNCTIONS) + len(MODULES) >= 250, "two kinds share a name"
    assert sorted(KINDS) == sorted(name for names in families().values() for name in names)
    assert {name for name, _ in KNOWN} | UNSURE | SKIPPED.keys() <= {*KINDS, *SKIPPED}


# --- the document ---

SYMBOLS = {"right": "✓", "refused": "–", "wrong": "✗", "nan": "∅", "error": "!"}
INTRODUCTION = """\
# Coverage

{functions} functions and {modules} modules as users write them, each by four transforms. The first
symbol of a cell is jacfunc's, the second torch.func's.

Written by `tests/house/test_coverage.py` with torch {torch} on the CPU; do not edit.

| symbol | meaning |
|:-:|---|
| ✓ | right: as a loop of `torch.autograd.grad` has it, which agrees with finite differences |
| – | refused, with a message that says what would work |
| ✗ | a wrong number, silently |
| ∅ | not a number, where there is a finite answer |
| ! | an error that does not say what would work |

`jacrev`, `jacfwd` and `hessian` are what they say; of a module they are `module_jacobian` with
`strategy="reverse"` or `"forward"`, by all parameters and inputs, and the Hessian of a smooth
function of its outputs by {entries} entries of them. Per sample is `vmap(jacobian(f))` beside
`vmap(jacrev(f))`, or `vmap(jacfwd(f))` where that fails, and `module_jacobian(per_sample=True)`.
Where a hook, `no_grad` or the like changes the gradient on purpose, the loop alone is the judge.
TorchScript is torch.func's if several calls are right, the first and later ones: forward mode
drops the tangents of scripts once these are optimized; of traced modules it was never seen to.
"""


def families() -> dict[str, list[str]]:
    """Names of kinds by family, in the order of the tables."""
    found = defaultdict(list)
    for name, kind in FUNCTIONS.items():
        found[kind.family].append(name)
    for table, kinds in vars(module_kinds).items():
        if isinstance(kinds, tuple) and kinds is not MODULE_KINDS and table.isupper():
            names = [k.name for k in kinds if isinstance(k, ModuleKind) and k.name in MODULES]
            if names:
                found[f"Modules: {table.lower()}"] = names
    return found


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    first, *rest = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return [first, "|---" + "|:-:" * (len(head) - 1) + "|", *rest]


def summary() -> list[str]:
    counts = Counter(
        (who, cell.verdict, transform)
        for name in KINDS
        for transform, cells in row(name).items()
        for who, cell in zip(("jacfunc", "torch.func"), cells, strict=True)
    )
    rows = [
        [f"{who}: {SYMBOLS[verdict]}", *(str(counts[who, verdict, t]) for t in TRANSFORMS)]
        for who in ("jacfunc", "torch.func")
        for verdict in SYMBOLS
        if any(counts[who, verdict, t] for t in TRANSFORMS)
    ]
    return table(["", *TRANSFORMS], rows)


Found = Iterator[tuple[str, str, str]]


def by_text(found: Found) -> list[str]:
    """A list of texts, each with its cells, from triples ``(text, transform, name)``."""
    cells: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for text, transform, name in found:
        cells[" ".join(text.split())][transform].append(name)
    return [line for text, by in cells.items() for line in [f"- {text}", *indented(by)]]


def indented(by: dict[str, list[str]]) -> list[str]:
    return [f"  - {transform}: {', '.join(names)}" for transform, names in by.items()]


def refusals() -> Found:
    """What messages say, without the name of the door in front."""
    for name in KINDS:
        for transform, (ours, _) in row(name).items():
            if ours.verdict == "refused":
                yield ours.message.partition(": ")[2], transform, name


def torchs_wrong() -> list[str]:
    return [
        f"- {transform}: "
        + ", ".join(name for name in KINDS if row(name)[transform][1].verdict == "wrong")
        for transform in TRANSFORMS
    ]


def document() -> str:
    parts = [
        INTRODUCTION.format(
            functions=len(FUNCTIONS), modules=len(MODULES), torch=VERSION, entries=ENTRIES
        ),
        *summary(),
    ]
    not_yet = ((reason, transform, name) for (name, transform), reason in KNOWN.items())
    sections = {
        "Refused, and what to do": by_text(refusals()),
        "Not yet": by_text(not_yet),
        "Where torch.func is silently wrong": torchs_wrong(),
        "Not tried": [f"- {name}: {why}" for name, why in SKIPPED.items()],
    }
    for title, names in families().items():
        rows = [
            [name, *(" ".join(SYMBOLS[cell.verdict] for cell in row(name)[t]) for t in TRANSFORMS)]
            for name in names
        ]
        sections[title] = table(["", *TRANSFORMS], rows)
    for title, lines in sections.items():
        if lines:
            parts += ["", f"## {title}", "", *lines]
    return "\n".join(parts) + "\n"


def test_the_document_says_what_was_found() -> None:
    """Last, since it needs every row; those that were not selected are worked out now."""
    if DEVICE != "cpu":
        pytest.skip("the document is about the CPU")
    writes = os.environ.get("JACFUNC_WRITE_DOCS") == "1"
    old = DOCS.read_text() if DOCS.exists() else ""
    if not writes and old and f"with torch {VERSION} " not in old:
        pytest.skip(f"the document is about another torch than {VERSION}")
    new = document()
    assert not re.search(r"0x[0-9a-f]{6}|/(tmp|home|usr)/", new), "an address or a path"
    if writes:
        DOCS.parent.mkdir(exist_ok=True)
        DOCS.write_text(new)
        return
    changes = list(difflib.unified_diff(old.splitlines(), new.splitlines(), "docs", "found", n=0))
    assert not changes, "\n".join(
        ["docs/coverage.md differs: set JACFUNC_WRITE_DOCS=1 to write it anew", *changes[:40]]
    )
