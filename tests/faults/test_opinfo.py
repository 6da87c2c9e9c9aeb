"""Every differentiable operator of torch, on the samples that torch tests itself by (OpInfo).

Each transform of each operator is right, judged by a loop of ``torch.autograd.grad``, or refuses:
never is it wrong. What refuses is listed, so that a change is noticed, and where torch.func is
right while we refuse, the reason stands beside it.
"""

import importlib.util
import itertools
import sys
import types
import unittest
import warnings

import pytest
import torch
from hypothesis import settings
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import jacfunc


def load_operators():
    """OpInfo's table, without what importing torch's test utilities does to everybody else."""
    if importlib.util.find_spec("expecttest") is None:  # they derive one class from it
        stub = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stub
    profile = settings.get_current_profile_name()  # they load their own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    settings.load_profile(profile)
    found = {}
    for op in op_db:
        if op.supports_autograd and torch.float64 in op.supported_dtypes("cpu"):
            variant = f".{op.variant_test_name}" if op.variant_test_name else ""
            found[op.name + variant] = op
    return found


OPERATORS = load_operators()

# Torch warns about beta features, deprecated operators and samples of its own making.
pytestmark = pytest.mark.filterwarnings("ignore")

# No case for a dense real Jacobian: what all samples of an operator come to.
OUTSIDE = {
    "complex": """
        cdouble cfloat chalf fft.fft fft.fft2 fft.fftn fft.ifft fft.ifft2 fft.ifftn
        fft.ihfft fft.ihfft2 fft.ihfftn fft.rfft fft.rfft2 fft.rfftn view_as_complex
    """,
    "sparse": """
        sparse.mm.reduce sparse.sampled_addmm
    """,
    "no floating input": """
        nn.functional.unfold
    """,
    "complex, no floating input": """
        complex linalg.eig linalg.eigvals polar
    """,
    "reads memory beside its input": "as_strided.partial_views",
}

# Their statistics are no differentiable outputs to torch, whose modes disagree about them.
STATISTICS_BESIDE = {
    "native_layer_norm",
    "native_group_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_batch_norm_with_update",
}

_NO_FORWARD = """
        __rpow__ _segment_reduce.lengths _segment_reduce.offsets as_strided_scatter bernoulli cdist
        cholesky cholesky_inverse grid_sampler_2d grid_sampler_3d index_reduce.amax
        index_reduce.amin index_reduce.mean index_reduce.prod native_dropout_backward
        nn.functional.ctc_loss nn.functional.embedding_bag
        nn.functional.fractional_max_pool2d nn.functional.fractional_max_pool3d
        nn.functional.grid_sample nn.functional.linear_cross_entropy.chunked
        nn.functional.linear_cross_entropy.chunked_none
        nn.functional.multi_head_attention_forward nn.functional.multi_margin_loss
        nn.functional.multilabel_margin_loss nn.functional.pdist normal
        normal.number_mean ormqr pca_lowrank scatter_reduce.prod svd_lowrank tensor_split
        to_sparse triangular_solve
"""

# Refused, by torch, or by jacfunc in _faults/; random operators inside vmap.
REFUSED = {
    "jacobian": "as_strided_scatter",
    "jacrev": "as_strided_scatter",
    "jacfwd": _NO_FORWARD,
    "hessian": """
        _segment_reduce.lengths _segment_reduce.offsets as_strided_scatter cdist
        nn.functional.ctc_loss nn.functional.hardsigmoid nn.functional.multi_margin_loss
        nn.functional.multilabel_margin_loss nn.functional.pdist
    """,
    "vmap jacrev": """
        as_strided_scatter bernoulli nn.functional.fractional_max_pool2d
        nn.functional.fractional_max_pool3d
        nn.functional.multi_head_attention_forward normal normal.number_mean pca_lowrank
        svd_lowrank
    """,
    "vmap jacfwd": _NO_FORWARD,
}

# Refused by us where torch.func is right.
_CHUNKED = "zero unless torch falls back to the unchunked form, which it does for soft targets"
_TRIANGLE = "right only where the tangents are triangular too"
_POWER = "nan at negative bases, where nobody can tell whose it is"
_OVERWRITTEN = "right only where what is overwritten has no gradient, or no sample overlaps"
OURS = {
    ("as_strided_scatter", "jacobian"): _OVERWRITTEN,
    ("as_strided_scatter", "jacrev"): _OVERWRITTEN,
    ("__rpow__", "jacfwd"): _POWER,
    ("__rpow__", "vmap jacfwd"): _POWER,
    ("nn.functional.linear_cross_entropy.chunked", "jacfwd"): _CHUNKED,
    ("nn.functional.linear_cross_entropy.chunked", "vmap jacfwd"): _CHUNKED,
    ("nn.functional.linear_cross_entropy.chunked_none", "jacfwd"): _CHUNKED,
    ("nn.functional.linear_cross_entropy.chunked_none", "vmap jacfwd"): _CHUNKED,
    ("triangular_solve", "jacfwd"): _TRIANGLE,
    ("triangular_solve", "vmap jacfwd"): _TRIANGLE,
}

MAX_IN, MAX_OUT = 30, 60  # entries of a sample as it is
CUT = 12  # entries of each side that is kept of a larger sample
FEW = 6  # entries of each side that a Hessian keeps
TRIED, TRIED_FOR_ANY = 12, 60  # samples looked at, and if there is no case among them


class Outside(Exception):  # noqa: N818
    """A sample that is no case for a dense real Jacobian."""


class Case:
    """An operator at a sample, as a function of all its floating tensors to a tuple of such."""

    def __init__(self, op, sample, is_chosen):
        self.op, self.finish = op, sample.output_process_fn_grad
        leaves, self.spec = tree_flatten((sample.input, tuple(sample.args), dict(sample.kwargs)))
        self.refuse_kinds(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        self.leaves = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        self.chosen = [i for i, x in enumerate(leaves) if is_chosen(x)]
        self.point = tuple(self.leaves[i] for i in self.chosen)
        self.num_in = sum(x.numel() for x in self.point)
        if not self.num_in:
            raise Outside("no floating input")
        outputs = self(*[x.clone().requires_grad_() for x in self.point])
        self.num_out = sum(out.numel() for out in outputs)
        if not self.num_out or not any(out.requires_grad for out in outputs):
            raise Outside("no differentiable output")

    @staticmethod
    def refuse_kinds(tensors):
        for x in tensors:
            if x.is_complex() or x.layout != torch.strided:
                raise Outside("complex" if x.is_complex() else "sparse")

    def __call__(self, *chosen):
        fresh = [x.clone() if isinstance(x, torch.Tensor) else x for x in self.leaves]
        for i, x in zip(self.chosen, chosen, strict=True):
            fresh[i] = x
        first, args, kwargs = tree_unflatten(fresh, self.spec)
        # the wrapper makes symmetric or triangular what the operator takes to be so
        output = self.finish(self.op.gradcheck_wrapper(self.op.op, first, *args, **kwargs))
        tensors = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        self.refuse_kinds(tensors)
        if self.op.name in STATISTICS_BESIDE:
            tensors = tensors[:1]
        return tuple(x for x in tensors if is_floating(x))


def is_floating(leaf):
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def is_meant_to_be_differentiated(leaf):
    return is_floating(leaf) and leaf.requires_grad


def clones(tensors):
    return tuple(x.clone() for x in tensors)


def some(tensor, count):
    """Positions of a few entries, spread over the tensor."""
    size = tensor.numel()
    if size <= count:
        return torch.arange(size)
    return torch.linspace(0, size - 1, count).round().long().unique()


def cut(func, point, few):
    """``func`` as a function of a few entries of its inputs, to a few of its outputs."""
    outputs = func(*clones(point))
    ins = [some(x, max(1, few // len(point))) for x in point]
    outs = [some(x, max(1, few // len(outputs))) for x in outputs]

    def smaller(*entries):
        full = [
            x.reshape(-1).index_put((i,), y).reshape(x.shape)
            for x, i, y in zip(point, ins, entries, strict=True)
        ]
        return tuple(out.reshape(-1)[i] for out, i in zip(func(*full), outs, strict=True))

    return smaller, tuple(x.reshape(-1)[i] for x, i in zip(point, ins, strict=True))


def samples_of(op):
    """A case, or the reason why it is none, for every sample."""
    torch.manual_seed(0)
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        try:
            try:
                yield Case(op, sample, is_floating)
            except RuntimeError:  # running statistics, say, must not require grad
                yield Case(op, sample, is_meant_to_be_differentiated)
        except Outside as outside:
            yield str(outside)


def cases_of(name):
    """``(function, point)`` of up to three samples; or why there is none.

    The first, a middle and the last sample that fit, or the smallest one cut down.
    """
    samples = samples_of(OPERATORS[name])
    found = list(itertools.islice(samples, TRIED))
    if all(isinstance(case, str) for case in found):
        found += itertools.islice(samples, TRIED_FOR_ANY - TRIED)
    cases = [case for case in found if not isinstance(case, str)]
    if not cases:
        return ", ".join(sorted(set(found)))
    fit = [case for case in cases if 1 < case.num_in <= MAX_IN and case.num_out <= MAX_OUT]
    if fit:
        return [(case, case.point) for case in dict.fromkeys((fit[0], fit[len(fit) // 2], fit[-1]))]
    smallest = min(cases, key=lambda case: case.num_in * case.num_out)
    return [cut(smallest, smallest.point, CUT)]


def rows_of(out, inputs, create_graph=False):
    """Blocks ``[*out, *in]`` of one output, a row at a time."""
    rows = []
    for entry in out.reshape(-1):
        grads = [None] * len(inputs)
        if entry.requires_grad:
            grads = torch.autograd.grad(
                entry, inputs, retain_graph=True, create_graph=create_graph, allow_unused=True
            )
        filled = zip(grads, inputs, strict=True)
        rows.append([torch.zeros_like(x) if g is None else g for g, x in filled])
    columns = zip(*rows, strict=True)
    return [torch.stack(c).view(out.shape + x.shape) for c, x in zip(columns, inputs, strict=True)]


def looped(func, point, order=1):
    """All blocks of the Jacobian or Hessian, in the order of a flattened tree."""
    inputs = [x.clone().requires_grad_() for x in point]
    found = func(*clones(inputs))
    for left in reversed(range(order)):
        found = [out for out in found if out.numel()]
        found = [block for out in found for block in rows_of(out, inputs, create_graph=left > 0)]
    return [block.detach() for block in found if block.numel()]


def central_differences(func, point, step=1e-5):
    """What :func:`looped` gives at order 2, for operators that are differentiable once."""
    sizes = [x.numel() for x in point]
    total = []
    for e in torch.eye(sum(sizes), dtype=torch.float64).mul(step):
        steps = [part.view(x.shape) for part, x in zip(e.split(sizes), point, strict=True)]
        above, below = (
            looped(func, tuple(x + sign * d for x, d in zip(point, steps, strict=True)))
            for sign in (1, -1)
        )
        total.append([(up - down) / (2 * step) for up, down in zip(above, below, strict=True)])
    found = []
    for columns in zip(*total, strict=True):
        parts = torch.stack(columns, dim=-1).split(sizes, dim=-1)
        found += [p.reshape(p.shape[:-1] + x.shape) for p, x in zip(parts, point, strict=True)]
    return found


def beside(point):
    """Another point near by: a second sample for vmap."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        x * (1 - 0.02 * torch.rand(x.shape, generator=generator, dtype=x.dtype)) for x in point
    )


def compare(actual, expected, tolerance):
    """``right``, ``nan`` or ``wrong``, looking where the expected blocks are finite."""
    actual = [block for block in actual if block.numel()]
    if [x.shape for x in actual] != [x.shape for x in expected]:
        return "wrong"
    found = "right"
    for got, want in zip(actual, expected, strict=True):
        near = max(tolerance, 1e-3 if want.dtype != torch.float64 else 0)
        finite = want.isfinite()
        got, want = got[finite].to(want.dtype), want[finite]
        if got.isnan().any():
            found = "nan"
        elif not torch.allclose(got, want, rtol=near, atol=near):
            return "wrong"
    return found


def derivatives(library, vmap, func, point):
    """Every transform under test, to be called with nothing."""
    every = tuple(range(len(point)))
    batch = tuple(map(torch.stack, zip(point, beside(point), strict=True)))
    small, corner = cut(func, point, FEW)
    return {
        "jacrev": lambda: library.jacrev(func, every)(*point),
        "jacfwd": lambda: library.jacfwd(func, every)(*point),
        "jacobian": lambda: getattr(library, "jacobian", library.jacrev)(func, every)(*point),
        "hessian": lambda: library.hessian(small, every)(*corner),
        "vmap jacrev": lambda: vmap(library.jacrev(func, every))(*batch),
        "vmap jacfwd": lambda: vmap(library.jacfwd(func, every))(*batch),
    }


def references(func, point):
    """``(blocks, tolerance)`` that every transform must give."""
    jacobian = looped(func, point)
    pairs = zip(jacobian, looped(func, beside(point)), strict=True)
    batched = [torch.stack(pair) for pair in pairs]
    small, corner = cut(func, point, FEW)
    try:
        second = looped(small, corner, order=2), 1e-7
    except (NotImplementedError, RuntimeError):
        second = central_differences(small, corner), 1e-4
    first = dict.fromkeys(("jacrev", "jacfwd", "jacobian"), (jacobian, 1e-7))
    mapped = dict.fromkeys(("vmap jacrev", "vmap jacfwd"), (batched, 1e-7))
    return first | mapped | {"hessian": second}


def verdict(derivative, expected, tolerance):
    """``right``, ``nan``, ``wrong`` or ``refused``; any other error is a fault of ours."""
    try:
        actual = tree_leaves(derivative())
    except (NotImplementedError, RuntimeError):
        return "refused"
    return compare(actual, expected, tolerance)


def listed(table, name):
    """The keys of a table of ``key: names`` under which a name stands."""
    return {key for key, names in table.items() if name in names.split()}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_derivative_is_right_or_refused(name):
    outside = listed(OUTSIDE, name)
    if outside == {"reads memory beside its input"}:
        pytest.skip("a clone has no memory beside it")
    cases = cases_of(name)
    if isinstance(cases, str):
        assert outside == {cases}
        return
    assert not outside
    verdicts, torch_right = set(), set()
    for case in cases:
        expected = references(*case)
        ours = derivatives(jacfunc, jacfunc.vmap, *case)
        theirs = derivatives(torch.func, torch.vmap, *case)
        for key, derivative in ours.items():
            found = verdict(derivative, *expected[key])
            verdicts.add((found, key))
            if found == "refused" and verdict(theirs[key], *expected[key]) == "right":
                torch_right.add(key)
    assert {key for found, key in verdicts if found in ("wrong", "nan")} == set()
    assert {key for found, key in verdicts if found == "refused"} == listed(REFUSED, name)
    assert torch_right == {key for op, key in OURS if op == name}


def test_tables_name_operators():
    named = {op for op, _ in OURS} | STATISTICS_BESIDE
    for names in (*OUTSIDE.values(), *REFUSED.values()):
        named |= set(names.split())
    assert named <= set(OPERATORS)
