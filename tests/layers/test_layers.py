"""What is known about layers, against a loop of ``torch.autograd.grad`` in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import jacfunc
from jacfunc.layers._convolution import Convolution
from jacfunc.strategies._structured import Structured
from tests.truth.factors import factors_of
from tests.truth.learned import learning

B = 3
# of a copy that torch makes
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


class Few(nn.Module):
    """A module of which three mixtures of all that comes out are kept: a row costs the judge."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x).flatten(1).tanh()
        mixing = torch.arange(3 * out.shape[1], dtype=out.dtype).sin().view(-1, 3)
        return out @ mixing


@dataclass(frozen=True)
class Case:
    """A module, and the shape of one sample, or what makes a batch of them.

    ``others``: how many parameters no rule covers, of which there is some use in the module.
    ``independent``: True where the gradients of a sample change with the others of a batch, and
    each sample is to be taken alone all the same.
    """

    name: str
    build: Callable[[], nn.Module]
    sample: Sequence[int] | Callable[[], Tensor]
    others: int = 0
    independent: Literal[True] | None = None

    def module(self, dtype: torch.dtype) -> nn.Module:
        """The same values in every dtype, none of them the neutral ones that torch starts with."""
        torch.manual_seed(1)
        module = Few(self.build()).float().eval()
        with torch.no_grad():
            for param in module.parameters():
                param += 0.3 * torch.randn(param.shape)
            for name, buffer in module.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.uniform_(0.5, 1.5)
        return module.to(dtype)

    def inputs(self, dtype: torch.dtype) -> Tensor:
        torch.manual_seed(2)
        if callable(self.sample):
            return self.sample()
        return torch.randn(B, *self.sample).to(dtype)


class Raw(nn.Module):
    """A function of a sample and parameters of these shapes."""

    def __init__(self, call: Callable[..., Tensor], *shapes: Sequence[int]) -> None:
        super().__init__()
        self.held = nn.ParameterList([torch.rand(shape) + 1 for shape in shapes])
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, *self.held)


class Calls(nn.Module):
    """Modules, and a function that calls them."""

    def __init__(self, call: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, *self.parts)


def raw(name: str, call: Callable[..., Tensor], x: Sequence[int], *shapes: Any) -> Case:
    return Case(name, lambda: Raw(call, *shapes), x)


def calls(name: str, call: Callable[..., Tensor], x: Any, *parts: Any, others: int = 0) -> Case:
    return Case(name, lambda: Calls(call, *(part() for part in parts)), x, others)


def indices(high: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(high, (B, *shape))


def by_statistics(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    ones = torch.ones_like(w.detach())
    return torch.batch_norm(x, w, b, ones, 2 * ones, False, 0.0, 0.1, False)


# --- the table ---

CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "groups": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    {"kernel_size": 2, "dilation": 2, "padding": 2},
    {"kernel_size": 3, "groups": 4, "padding": 1},
    {"kernel_size": 2, "stride": 3, "padding": 2, "dilation": 2, "groups": 2},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 2, "padding": "same", "dilation": 3},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "stride": 2},
]
TRANSPOSED: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": 2, "dilation": 2, "output_padding": 1, "bias": False},
    {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "groups": 2},
    {"kernel_size": 2, "groups": 4},
]
SIZES = {1: (4, 9), 2: (4, 6, 5), 3: (4, 5, 4, 5)}


def convolution(kind: str, n: int, options: dict[str, Any]) -> Case:
    make = getattr(nn, f"{kind}{n}d")
    words = " ".join(f"{name}={value}" for name, value in options.items())
    return Case(f"{kind}{n}d {words}", lambda: make(4, 8, **options), SIZES[n])


CASES = [
    *(convolution("Conv", n, options) for n, options in product(SIZES, CONVOLUTIONS)),
    *(convolution("ConvTranspose", n, options) for n, options in product(SIZES, TRANSPOSED)),
    Case(
        "Conv2d uneven",
        lambda: nn.Conv2d(4, 2, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)),
        (4, 7, 6),
    ),
    calls("conv of one image", lambda x, c: c(x[0])[None], (4, 6, 5), lambda: nn.Conv2d(4, 2, 3)),
    calls(
        "transposed conv of one image",
        lambda x, c: c(x[0])[None],
        (4, 3),
        lambda: nn.ConvTranspose1d(4, 2, 3, stride=2),
    ),
    calls("conv of frames", lambda x, c: c(x[0])[None], (3, 4, 5), lambda: nn.Conv1d(4, 2, 3)),
    calls("conv called twice", lambda x, c: c(c(x)), (2, 6, 5), lambda: nn.Conv2d(2, 2, 3)),
    raw(
        "conv and its transposed",
        lambda x, w: F.conv_transpose2d(F.conv2d(x, w).tanh(), w),
        (2, 5, 4),
        (3, 2, 2, 2),
    ),
    raw("part of a kernel", lambda x, w: F.conv1d(x, w[:, :2], w[:, 2, 0]), (2, 5), (3, 3, 2)),
    raw("keywords", lambda x, w: F.conv1d(input=x, padding=1, weight=w), (2, 5), (3, 2, 3)),
    # normalizations
    Case("LayerNorm", lambda: nn.LayerNorm(5), (4, 5)),
    Case("LayerNorm of two dimensions", lambda: nn.LayerNorm((4, 1), eps=0.1), (3, 4, 1)),
    Case("LayerNorm without bias", lambda: nn.LayerNorm(5, bias=False), (5,)),
    Case("RMSNorm", lambda: nn.RMSNorm(5), (4, 5)),
    Case("RMSNorm with eps", lambda: nn.RMSNorm((4, 5), eps=0.1), (2, 4, 5)),
    Case("GroupNorm", lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    Case("GroupNorm of vectors", lambda: nn.GroupNorm(2, 6, eps=0.1), (6,)),
    Case("InstanceNorm1d", lambda: nn.InstanceNorm1d(3, affine=True), (3, 5)),
    Case("InstanceNorm2d", lambda: nn.InstanceNorm2d(3, affine=True, eps=0.1), (3, 4, 5)),
    Case(
        "InstanceNorm3d by statistics",
        lambda: nn.InstanceNorm3d(3, affine=True, track_running_stats=True),
        (3, 2, 3, 2),
    ),
    Case("BatchNorm1d of vectors", lambda: nn.BatchNorm1d(4, eps=0.1), (4,)),
    Case("BatchNorm1d", lambda: nn.BatchNorm1d(4), (4, 5)),
    Case("BatchNorm2d", lambda: nn.BatchNorm2d(4), (4, 3, 2)),
    Case("BatchNorm3d", lambda: nn.BatchNorm3d(4), (4, 3, 2, 2)),
    raw("layer_norm", lambda x, w, b: torch.layer_norm(x, (5,), w, b, 0.1), (4, 5), (5,), (5,)),
    raw("rms_norm", lambda x, w: torch.rms_norm(x, (5,), w), (4, 5), (5,)),
    raw("group_norm", lambda x, w, b: torch.group_norm(x, 2, w, b), (4, 3), (4,), (4,)),
    raw("batch_norm", by_statistics, (4, 3), (4,), (4,)),
    raw(
        "instance_norm",
        lambda x, w, b: torch.instance_norm(x, w, b, None, None, True, 0.0, 0.1, False),
        (4, 3),
        *((4,), (4,)),
    ),
    calls("norm called twice", lambda x, n: n(n(x).tanh()), (4, 5), lambda: nn.LayerNorm(5)),
    # entry by entry
    raw("x * w", lambda x, w: x * w, (4, 5), (5,)),
    raw("w * x", lambda x, w: w * x, (4, 5), (4, 1)),
    raw("w * x of fewer dimensions", lambda x, w: w * x[0], (5,), (1, 4, 5)),
    raw("w * x both broadcast", lambda x, w: (w * x[0])[None], (4, 1), (2, 1, 5)),
    raw("scalar * x", lambda x, w: torch.mul(x, w), (4,), ()),
    raw("multiply", lambda x, w: x.multiply(w), (4,), (4,)),
    raw("integer * w", lambda x, w: (x > 0).long() * w, (4,), (4,)),
    raw("flag * w", lambda x, w: w * (x > 0), (4,), (4,)),
    raw("w * w", lambda x, w: (w * w) * x, (4,), (4,)),
    raw("2 * w", lambda x, w: x @ (2 * w), (4,), (4, 2)),
    raw("x / w", lambda x, w: x / w, (4, 5), (5,)),
    raw("w / x", lambda x, w: torch.div(w, x.exp()), (4, 5), (4, 1)),
    raw("x + w", lambda x, w: x + w, (4, 5), (4, 5)),
    raw("w + x of fewer dimensions", lambda x, w: torch.add(w, x[0], alpha=2), (5,), (1, 4, 5)),
    raw("add with alpha", lambda x, w: torch.add(x, w, alpha=2), (4, 5), (5,)),
    raw("x - w", lambda x, w: x - w, (4, 5), (1, 5)),
    raw("w - x", lambda x, w: (w - x).square(), (4, 5), (5,)),
    raw("sub with alpha", lambda x, w: x.sub(w, alpha=-3), (4, 5), (5,)),
    raw("addcmul", lambda x, v, w: torch.addcmul(v, x, w, value=2), (4, 5), (5,), (4, 1)),
    Case("PReLU", nn.PReLU, (4, 5)),
    Case("PReLU of channels", lambda: nn.PReLU(4), (4, 5, 2)),
    Case("PReLU of vectors", lambda: nn.PReLU(4), (4,)),
    # tables
    Case("Embedding", lambda: nn.Embedding(5, 3), indices(5, 6)),
    Case("Embedding with padding", lambda: nn.Embedding(5, 3, padding_idx=-4), indices(5, 6)),
    Case("Embedding of grids", lambda: nn.Embedding(5, 3), lambda: indices(5, 2, 4)().int()),
    calls("embedding of one", lambda x, e: e(x[0])[None], indices(5), lambda: nn.Embedding(5, 3)),
    raw("embedding", lambda x, w: torch.embedding(w, (x > 0).long(), 1), (6,), (5, 3)),
    *(
        Case(
            f"EmbeddingBag {mode} padding={padding}",
            lambda mode=mode, padding=padding: nn.EmbeddingBag(
                4, 3, mode=mode, padding_idx=padding
            ),
            indices(4, 6),
        )
        for mode, padding in product(("sum", "mean"), (None, 2))
    ),
    Case("EmbeddingBag max", lambda: nn.EmbeddingBag(4, 3, mode="max"), indices(4, 6), 1),
    Case(
        "Embedding by frequency",
        lambda: nn.Embedding(5, 3, scale_grad_by_freq=True),
        indices(5, 6),
        others=1,
        independent=True,
    ),
    # together
    calls(
        "tied embedding",
        lambda x, e, n: F.linear(n(e(x)).tanh(), e.weight),
        indices(5, 4),
        lambda: nn.Embedding(5, 3),
        lambda: nn.LayerNorm(3),
    ),
    calls(
        "used elsewhere, too",
        lambda x, c: c(x) * c.weight.exp().sum() + c.bias.prod(),
        (2, 5),
        lambda: nn.Conv1d(2, 3, 2),
        others=2,
    ),
    Case(
        "numbers that are read from tensors",
        lambda: Raw(
            lambda x, w, b, k: F.conv1d(
                F.layer_norm(x, (3,), w, b, torch.tensor(0.5)),  # type: ignore[arg-type]
                0.1 * k,
                padding=torch.tensor(1),  # type: ignore[arg-type]
            ),
            *((3,), (3,), (2, 2, 2)),
        ),
        (2, 3),
        others=2,
    ),
    Case(
        "network",
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.GroupNorm(2, 4), nn.PReLU(4)),
            *(nn.Flatten(), nn.Linear(16, 3)),
        ),
        (2, 6, 6),
    ),
]
BY_NAME = {case.name: case for case in CASES}
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=BY_NAME)
# torch derives no bag of embeddings twice
TWICE = [case for case in CASES if "Bag" not in case.name]
EVERY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


# --- the judge ---


def looped(module: nn.Module, inputs: Tensor, create_graph: bool = False) -> dict[str, Tensor]:
    """``[B, *out, *param]`` by name, a sample and an output entry at a time."""
    params = dict(module.named_parameters())
    found: dict[str, list[Tensor]] = {name: [] for name in params}
    options = {"allow_unused": True, "materialize_grads": True}
    for x in inputs:
        out = module(x[None])[0]
        rows = [
            torch.autograd.grad(
                entry, [*params.values()], retain_graph=True, create_graph=create_graph, **options
            )
            for entry in out.flatten()
        ]
        for (name, param), row in zip(params.items(), zip(*rows, strict=True), strict=True):
            found[name].append(torch.stack(row).view(*out.shape, *param.shape))
    return {name: torch.stack(blocks) for name, blocks in found.items()}


def judged(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The values of this dtype, differentiated in float64."""
    inputs = case.inputs(dtype)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    return looped(case.module(dtype).double(), inputs)


def assert_near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Relative to the largest entry."""
    assert found.shape == wanted.shape
    scale = wanted.abs().max().item()
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * scale)


# --- the tests ---


@EVERY_DTYPE
@EVERY_CASE
def test_samples(case: Case, dtype: torch.dtype) -> None:
    module, inputs = case.module(dtype), case.inputs(dtype)
    jacobian = jacfunc.module_jacobian(
        module, per_sample=True, strategy=Structured(), independent=case.independent
    )
    wanted = judged(case, dtype)
    with learning() as learned:
        found = jacobian(inputs), jacobian(inputs)  # the second without copies of parameters
    for jac in found:
        assert jac.keys() == wanted.keys()
        for name, block in jac.items():
            assert block.dtype == dtype
            assert_near(block, wanted[name], TOLERANCE[dtype])
    met = learned[-1]
    # nothing is right only because no rule was asked; as a whole, all is covered
    assert len(met.others) == (case.others if len(learned) > 1 else 0)


@EVERY_DTYPE
@EVERY_CASE
def test_flat(case: Case, dtype: torch.dtype) -> None:
    module, inputs = case.module(dtype), case.inputs(dtype)
    flat = jacfunc.module_jacobian(
        module, per_sample=True, flat=True, strategy="structured", independent=case.independent
    )
    blocks = judged(case, dtype).items()
    sizes = {name: param.numel() for name, param in module.named_parameters()}
    wanted = torch.cat([block.reshape(B, -1, sizes[name]) for name, block in blocks], -1)
    assert_near(flat(inputs), wanted, TOLERANCE[dtype])


@EVERY_CASE
def test_one_call(case: Case) -> None:
    module, inputs = case.module(torch.float64), case.inputs(torch.float64)[:1]
    params = {name: param.detach() for name, param in module.named_parameters()}

    def call(params: dict[str, Tensor]) -> Tensor:
        return functional_call(module, params, (inputs,))

    jac = jacfunc.jacobian(call, strategy="structured")(params)
    for name, block in judged(case, torch.float64).items():
        assert_near(jac[name], block[:1], 1e-10)


@pytest.mark.parametrize("case", TWICE, ids=lambda case: case.name)
def test_differentiated(case: Case) -> None:
    """A Jacobian inside a loss trains."""
    module, inputs = case.module(torch.float64), case.inputs(torch.float64)
    jac_of = jacfunc.module_jacobian(
        module,
        per_sample=True,
        strategy="structured",
        create_graph=True,
        independent=case.independent,
    )
    params = [*module.parameters()]
    found, wanted = (
        torch.autograd.grad(
            sum(block.square().sum() for block in jac.values()), params, materialize_grads=True
        )
        for jac in (jac_of(inputs), looped(module, inputs, create_graph=True))
    )
    for mine, other in zip(found, wanted, strict=True):
        assert_near(mine, other, 1e-10)


@pytest.mark.parametrize("name", ["network", "transposed conv of one image"])
def test_a_sample_at_a_time(name: str) -> None:
    case = BY_NAME[name]
    module, inputs = case.module(torch.float64), case.inputs(torch.float64)
    judge, convolutions = judged(case, torch.float64), 0
    with factors_of(module, inputs) as jacobian:
        parts_of_params = jacobian.parts_of_rows(0, 3, 0)
    for (param, block), parts in zip(judge.items(), parts_of_params, strict=True):
        for form in (part.form for part in parts if isinstance(part.form, Convolution)):
            result = torch.full_like(block, torch.nan)
            form.write(result, at_once=1)
            assert_near(result, judge[param], TOLERANCE[torch.float64])
            convolutions += 1
    assert convolutions


def test_data_of_a_wider_dtype() -> None:
    module = Raw(lambda x, w: (x * w).exp() / (w + 1) - w, (4,))
    x = torch.rand(B, 4, dtype=torch.float64)
    jac = jacfunc.module_jacobian(module, per_sample=True, strategy="structured")(x)
    (found,) = jac.values()
    assert found.dtype == torch.float64
    # torch rounds the gradient of a float32 parameter
    (wanted,) = looped(module.double(), x).values()
    assert_near(found, wanted, 1e-6)


def test_sparse_data_is_left_to_the_other_engine() -> None:
    eye = torch.eye(4, dtype=torch.float64).to_sparse()
    jac = jacfunc.jacobian(lambda w: torch.mm(eye, w), strategy="structured")
    found = jac(torch.rand(4, 2, dtype=torch.float64))
    assert_near(found.reshape(8, 8), torch.eye(8, dtype=torch.float64), 1e-10)


def test_a_complex_factor_is_left_to_the_other_engine() -> None:
    module = Raw(lambda x, w: (torch.complex(x, 2 * x) * w).abs(), (4,)).double()
    x = torch.rand(B, 4, dtype=torch.float64)
    jacobian = jacfunc.module_jacobian(module, per_sample=True, strategy=Structured())
    with learning() as learned:
        jac = jacobian(x)
    (found,), (wanted,) = jac.values(), looped(module, x).values()
    assert_near(found, wanted, 1e-10)
    assert [met.others for met in learned] == [{0}, {0}]  # as a whole, then under vmap
