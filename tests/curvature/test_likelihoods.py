"""Fisher matrices by torch's losses, against sums over all targets that may be drawn.

The oracle of an expectation adds up the squared gradients of the loss at every target, times its
chance; that of a draw repeats it, and differentiates the loss there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacfunc

B = 3


class Case(NamedTuple):
    """A likelihood: what fisher gets, minus its logarithm summed up, and over how many terms."""

    given: Any
    options: dict[str, Any]
    minus_log: Callable[[Tensor, Tensor], Tensor]
    terms: int
    shape: tuple[int, ...]
    """Of one sample's outputs."""
    kind: str


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets, reduction="sum")


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return squares(outputs, targets) / 2


def bits(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")


def counts(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.poisson_nll_loss(outputs, targets, reduction="sum")


SUM = {"reduction": "sum"}
CASES = {
    "cross_entropy": Case(F.cross_entropy, {}, cross_entropy, B, (4,), "classes"),
    "CrossEntropyLoss": Case(nn.CrossEntropyLoss(), {}, cross_entropy, B, (4,), "classes"),
    "CrossEntropyLoss, sum": Case(
        nn.CrossEntropyLoss(reduction="sum"), {}, cross_entropy, 1, (4,), "classes"
    ),
    "cross_entropy, sum": Case(F.cross_entropy, SUM, cross_entropy, 1, (4,), "classes"),
    "partial": Case(
        partial(F.cross_entropy, reduction="sum"), {}, cross_entropy, 1, (4,), "classes"
    ),
    "classes in dimension 1": Case(F.cross_entropy, {}, cross_entropy, 2 * B, (3, 2), "classes"),
    "mse_loss": Case(F.mse_loss, {}, squares, 2 * B, (2,), "numbers"),
    "MSELoss, sum": Case(nn.MSELoss(reduction="sum"), SUM, squares, 1, (2,), "numbers"),
    "gaussian": Case("gaussian", {}, half_squares, B, (2,), "numbers"),
    "BCE": Case(F.binary_cross_entropy_with_logits, {}, bits, 4 * B, (2, 2), "bits"),
    "BCEWithLogitsLoss": Case(nn.BCEWithLogitsLoss(), {}, bits, 3 * B, (3,), "bits"),
    "bernoulli": Case("bernoulli", {}, bits, B, (2, 2), "bits"),
    "bernoulli, sum": Case("bernoulli", SUM, bits, 1, (3,), "bits"),
    "poisson_nll_loss": Case(F.poisson_nll_loss, {}, counts, B, (1,), "counts"),
    "PoissonNLLLoss, full": Case(nn.PoissonNLLLoss(full=True), {}, counts, B, (1,), "counts"),
}
EVERY_CASE = pytest.mark.parametrize("name", CASES)


def every_target(case: Case, outputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """All targets of one sample, ``[1, …]``, each with its chance.

    Of numbers, the points of a quadrature that is exact for polynomials up to the third degree; of
    counts, those below forty.
    """
    width = outputs.numel()
    if case.kind == "classes":
        positions = outputs.flatten(1).T if outputs.dim() > 1 else outputs.unsqueeze(0)
        chances = positions.softmax(1)
        for choice in product(range(len(outputs)), repeat=len(positions)):
            chance = torch.stack([chances[n, c] for n, c in enumerate(choice)]).prod()
            yield torch.tensor(choice).reshape(1, *outputs.shape[1:]), chance
        return
    single = {
        "bits": lambda out: [(y, (out if y else -out).sigmoid()) for y in (0.0, 1.0)],
        "numbers": lambda out: [
            (out + sign * (0.5 if case.minus_log is squares else 1.0) ** 0.5, torch.tensor(0.5))
            for sign in (-1.0, 1.0)
        ],
        "counts": lambda out: [
            (float(y), torch.distributions.Poisson(out.exp()).log_prob(torch.tensor(y)).exp())
            for y in range(40)
        ],
    }[case.kind]
    for choice in product(*(single(out) for out in outputs.flatten())):
        targets = torch.stack([torch.as_tensor(y, dtype=outputs.dtype) for y, _ in choice])
        assert len(choice) == width
        yield targets.reshape(1, *outputs.shape), torch.stack([p for _, p in choice]).prod()


def network(shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    width = torch.Size(shape).numel()
    layers = [nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, width), nn.Unflatten(1, shape)]
    return nn.Sequential(*layers).double()


def gradient(model: nn.Module, case: Case, x: Tensor, targets: Tensor) -> Tensor:
    """Of minus a log likelihood of one sample, in all parameters."""
    loss = case.minus_log(model(x.unsqueeze(0)), targets)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(B, 2, dtype=torch.float64)


@EVERY_CASE
def test_the_expectation_is_that_of_all_targets(name: str) -> None:
    """The loss's Gauss-Newton matrix is this expectation, and draws tend to it."""
    case, x = CASES[name], inputs()
    model = network(case.shape)
    expected: Any = 0.0
    for sample in x:
        total: Any = 0.0
        for targets, chance in every_target(case, model(sample.unsqueeze(0))[0].detach()):
            g = gradient(model, case, sample, targets)
            total = total + chance * torch.outer(g, g)
        expected = expected + total / case.terms
    anything = torch.zeros(B, *case.shape[1:]).long() if case.kind == "classes" else model(x)
    if callable(case.given):
        loss = partial(case.given, **case.options) if case.options == SUM else case.given
        loss = case.given if isinstance(case.given, nn.Module) else loss
        G = jacfunc.ggn(model, loss)(x, anything.detach())
        torch.testing.assert_close(G.matrix(), expected, rtol=1e-7, atol=1e-9)
    torch.manual_seed(2)
    found = jacfunc.fisher(model, case.given, draws=20_000, **case.options)(x).matrix()
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def drawn(case: Case, outputs: Tensor, draws: int) -> Tensor:
    """The targets that a generator gives, ``[K, B, …]``."""
    generator = torch.Generator().manual_seed(7)
    size = draws, *outputs.shape
    if case.kind == "classes":
        chances = outputs.movedim(1, -1).softmax(-1)
        classes = torch.multinomial(chances.flatten(0, -2), draws, True, generator=generator)
        return classes.T.reshape(draws, *chances.shape[:-1])
    if case.kind == "numbers":
        noise = torch.randn(size, generator=generator, dtype=outputs.dtype)
        return outputs - noise * (0.5 if case.minus_log is squares else 1.0) ** 0.5
    if case.kind == "bits":
        return torch.bernoulli(outputs.sigmoid().expand(size), generator=generator)
    return torch.poisson(outputs.exp().expand(size), generator=generator)


@EVERY_CASE
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_matrix_is_that_of_its_draws(name: str, chunk_size: int | None) -> None:
    case, x = CASES[name], inputs()
    model = network(case.shape)
    expected: Any = 0.0
    for targets in drawn(case, model(x).detach(), 4):
        for sample, target in zip(x, targets, strict=True):
            g = gradient(model, case, sample, target.unsqueeze(0))
            expected = expected + torch.outer(g, g) / (4 * case.terms)
    generator = torch.Generator().manual_seed(7)
    fisher = jacfunc.fisher(
        model, case.given, draws=4, generator=generator, chunk_size=chunk_size, **case.options
    )
    found = fisher(x)
    torch.testing.assert_close(found.matrix(), expected)
    vector = {key: torch.randn_like(param) for key, param in model.named_parameters()}
    flat = torch.cat([v.flatten() for v in vector.values()]).detach()
    got = torch.cat([v.flatten() for v in (found @ vector).values()])
    torch.testing.assert_close(got, expected @ flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["BCE", "poisson_nll_loss", "cross_entropy", "mse_loss"])
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    model, x = network(case.shape).to(dtype), inputs().to(dtype)
    diagonal = jacfunc.fisher(model, case.given)(x).diagonal()
    assert all(value.dtype == dtype and value.isfinite().all() for value in diagonal.values())


def test_a_bit_that_is_almost_certain() -> None:
    """Its gradient is the chance of the other one, which the difference from one would round."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 30.0)
    F_ = jacfunc.fisher(model, "bernoulli", reduction="sum")(torch.ones(1, 1)).matrix()
    torch.testing.assert_close(
        F_[0, 0].double(), torch.tensor(-60.0).double().exp(), rtol=1e-5, atol=0.0
    )


def hooked() -> nn.Module:
    loss = nn.MSELoss()
    loss.register_forward_hook(lambda module, args, out: 2 * out)
    return loss


@pytest.mark.parametrize(
    ("likelihood", "options", "words"),
    [
        (nn.CrossEntropyLoss(torch.ones(4)), {}, "got cross_entropy with weight set"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), {}, "with label_smoothing set"),
        (nn.CrossEntropyLoss(ignore_index=0), {}, "with ignore_index set"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(4)), {}, "with pos_weight set"),
        (nn.PoissonNLLLoss(log_input=False), {}, "with log_input set"),
        (
            nn.CrossEntropyLoss(reduction="none"),
            {},
            "reduction must be 'mean' or 'sum', got 'none'",
        ),
        (F.mse_loss, {"reduction": "none"}, "reduction must be 'mean' or 'sum', got 'none'"),
        (nn.MSELoss(), SUM, "reduction must be that of the loss, got 'sum' beside a mse_loss"),
        (F.gaussian_nll_loss, {}, "likelihood must be one of .* got gaussian_nll_loss"),
        (nn.GaussianNLLLoss(), {}, "likelihood must be one of .* got GaussianNLLLoss"),
        (F.huber_loss, {}, "likelihood must be one of .*, got huber_loss. For another loss"),
        (lambda x, y: F.mse_loss(x, y), {}, "likelihood must be one of .*, got <lambda>"),
        (hooked(), {}, "likelihood must be one of .*, got MSELoss"),
        (partial(F.mse_loss, size_average=True), {}, "likelihood must be one of .* got partial"),
        (nn.CrossEntropyLoss, {}, "likelihood must be one of .*, got the class CrossEntropyLoss"),
        (["categorical"], {}, "likelihood must be one of .* got list"),
    ],
)
def test_what_is_no_likelihood_is_refused(
    likelihood: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=f"^fisher: .*{words}"):
        jacfunc.fisher(nn.Linear(2, 4), likelihood, **options)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(x)}


def test_outputs_that_a_loss_does_not_take() -> None:
    with pytest.raises(ValueError, match="fisher: with cross_entropy the module must return one"):
        jacfunc.fisher(Pair(), F.cross_entropy)(torch.ones(2, 2))
    flat = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
    with pytest.raises(ValueError, match=r"fisher: .* dimension 1 of the outputs must hold the cl"):
        jacfunc.fisher(flat, F.cross_entropy)(torch.ones(2, 2))
