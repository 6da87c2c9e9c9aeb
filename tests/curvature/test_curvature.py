"""Gauss-Newton and Fisher matrices, gradient norms and projections, against looped derivatives."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from jacfunc._assembly import shared_units
from jacfunc._curvature.signs import SignMatrix, projected
from jacfunc._factored.parts import NamedParts, Part
from jacfunc._factored.squares import add_squares, norms
from jacfunc.layers._forms import Gather, Outer, Rows
from tests.truth.factors import at_batch


class Encoder(nn.Module):
    """Attention by hand, layer norms, an embedding used twice and a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.packed = nn.Linear(6, 18)
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(2))
        self.wide, self.narrow = nn.Linear(6, 9), nn.Linear(9, 6)
        self.scale = nn.Parameter(torch.rand(6))
        self.shift = nn.Parameter(torch.tensor(0.3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        queries, keys, values = self.packed(x).chunk(3, -1)
        weights = (queries @ keys.mT / 2).softmax(-1)
        x = self.norms[0](x + weights @ values * self.scale)
        x = self.norms[1](x + self.narrow(F.gelu(self.wide(x)))) + self.shift
        return x.mean(-2) @ self.table.weight.T


class Attention(nn.Module):
    """Torch's own, whose three projections are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Shared(nn.Module):
    """One layer used three times, once as the transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(torch.tanh(self.first(x))))
        return self.head(x @ self.first.weight)


class Heads(nn.Module):
    """Two outputs, of other shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.classes, self.values = nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.tanh(self.body(x))
        return {"classes": self.classes(x), "values": self.values(x)}


class Table(nn.Module):
    """Rows of a table, some looked up several times by one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens).cumsum(1)).mean(1))


class LastOfLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.cell(x)[0][:, -1]
        return last


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.BatchNorm2d(4).eval(),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def positional() -> nn.Module:
    """Few positions a sample, fewer than outputs; and classes in the last dimension."""
    return nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4))


def of_heads(outputs: dict[str, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    errors = (outputs["values"] - targets[1]).square().mean()
    return F.cross_entropy(outputs["classes"], targets[0]) + errors


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


def of_positions(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def of_nobody(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss of which nothing is known beforehand."""
    return F.cross_entropy(outputs, targets)


def squares_of_nobody(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets)


BY_EITHER = pytest.mark.parametrize("loss", [F.cross_entropy, of_nobody])


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    loss: Callable[[Any, Any], Tensor]
    targets: Callable[[], Any]


def classes() -> Tensor:
    return torch.randint(3, (5,))


def of_shape(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, dtype=torch.float64)


def tokens(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(7, shape)


CASES = {
    "mlp": Case(mlp, of_shape(5, 4), F.cross_entropy, classes),
    "mlp sum": Case(mlp, of_shape(5, 4), summed, classes),
    "mlp squares": Case(mlp, of_shape(5, 4), F.mse_loss, of_shape(5, 3)),
    "mlp, a loss of nobody": Case(mlp, of_shape(5, 4), of_nobody, classes),
    "mlp, squares of nobody": Case(mlp, of_shape(5, 4), squares_of_nobody, of_shape(5, 3)),
    "mlp huber": Case(mlp, of_shape(5, 4), F.huber_loss, of_shape(5, 3)),
    "convolutions": Case(convolutional, of_shape(5, 2, 6, 6), F.cross_entropy, classes),
    "encoder": Case(Encoder, tokens(4, 3), F.cross_entropy, lambda: torch.randint(7, (4,))),
    "attention": Case(Attention, of_shape(5, 3, 4), F.cross_entropy, classes),
    "table": Case(Table, tokens(5, 6), F.cross_entropy, classes),
    "shared": Case(Shared, of_shape(5, 4), F.cross_entropy, classes),
    "lstm": Case(LastOfLSTM, of_shape(5, 3, 4), F.cross_entropy, classes),
    "heads": Case(Heads, of_shape(5, 4), of_heads, lambda: (classes(), of_shape(5, 2)())),
    "positions": Case(
        positional, of_shape(3, 2, 4), of_positions, lambda: torch.randint(4, (3, 2))
    ),
}
EVERY_CASE = pytest.mark.parametrize("name", CASES)


class Truth(NamedTuple):
    """What loops of autograd.grad in float64 give."""

    jacobian: Tensor  # [B, M, P]
    matrix: Tensor  # [P, P]
    gradients: Tensor  # [B, P]


def leaves_of(outputs: Any) -> list[Tensor]:
    return list(outputs.values()) if isinstance(outputs, dict) else [outputs]


def rebuilt(outputs: Any, rows: Tensor) -> Any:
    """``[B, M]`` as what the module returns."""
    leaves = leaves_of(outputs)
    parts = rows.split([leaf[0].numel() for leaf in leaves], 1)
    shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return dict(zip(outputs, shaped, strict=True)) if isinstance(outputs, dict) else shaped[0]


def in_rows(outputs: Any) -> Tensor:
    leaves = leaves_of(outputs)
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)


def truth(model: nn.Module, case: Case, inputs: Tensor, targets: Any) -> Truth:
    params = list(model.parameters())

    def gradient(entry: Tensor) -> Tensor:
        found = torch.autograd.grad(entry, params, retain_graph=True, materialize_grads=True)
        return torch.cat([product.flatten() for product in found])

    singles = [in_rows(model(inputs[b : b + 1]))[0] for b in range(len(inputs))]
    jacobian = torch.stack([torch.stack([gradient(entry) for entry in row]) for row in singles])
    outputs = model(inputs)
    rows = in_rows(outputs).detach()

    def loss(flat: Tensor) -> Tensor:
        return case.loss(rebuilt(outputs, flat.view(rows.shape)), targets)

    point = rows.flatten().requires_grad_()
    (slope,) = torch.autograd.grad(loss(point), point, create_graph=True)
    hessian = torch.zeros(point.numel(), point.numel(), dtype=point.dtype)
    if slope.requires_grad:
        for i, entry in enumerate(slope):
            hessian[i] = torch.autograd.grad(entry, point, retain_graph=True)[0]
    flat = jacobian.flatten(0, 1)
    gradients = torch.einsum("bm,bmp->bp", slope.detach().view(rows.shape), jacobian)
    return Truth(jacobian, flat.T @ hessian @ flat, gradients)


def posed(name: str) -> tuple[nn.Module, Case, Tensor, Any, Truth]:
    case = CASES[name]
    model = case.make().double()
    inputs, targets = case.inputs(), case.targets()
    return model, case, inputs, targets, truth(model, case, inputs, targets)


def flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in named.values()])


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert not found.requires_grad
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


# --- against the materialized Jacobian ---


@EVERY_CASE
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_gauss_newton_is_exact(name: str, chunk_size: int | None) -> None:
    model, case, inputs, targets, true = posed(name)
    found = jacfunc.ggn(model, case.loss, chunk_size=chunk_size)(inputs, targets)
    assert_close(flat(found.diagonal()), true.matrix.diagonal())
    assert_close(found.matrix(), true.matrix)
    slices = jacfunc.param_slices(model)
    for key, block in found.blocks().items():
        part = true.matrix[slices[key], slices[key]]
        assert (block - part).abs().max() <= 1e-10 * true.matrix.abs().max()
    for _ in range(2):
        vector = {key: torch.randn_like(param) for key, param in model.named_parameters()}
        assert_close(flat(found @ vector), true.matrix @ flat(vector).detach())


@EVERY_CASE
def test_gauss_newton_in_single_precision(name: str) -> None:
    model, case, inputs, targets, true = posed(name)
    single = copy.deepcopy(model).float()
    is_float = inputs.is_floating_point()

    def narrowed(tree: Any) -> Any:
        if isinstance(tree, tuple):
            return tuple(map(narrowed, tree))
        return tree.float() if tree.is_floating_point() else tree

    found = jacfunc.ggn(single, case.loss)(
        inputs.float() if is_float else inputs, narrowed(targets)
    )
    assert_close(flat(found.diagonal()), true.matrix.diagonal(), 1e-5)
    vector = {key: torch.randn_like(param) for key, param in single.named_parameters()}
    assert_close(flat(found @ vector), true.matrix @ flat(vector).detach().double(), 1e-5)


@EVERY_CASE
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_gradient_norms_are_exact(name: str, chunk_size: int | None) -> None:
    model, case, inputs, targets, true = posed(name)
    found = jacfunc.gradient_norms(model, case.loss, chunk_size=chunk_size)(inputs, targets)
    assert_close(found, true.gradients.norm(dim=1))


class TwoLayers(nn.Module):
    """Two layers whose outputs are added: they share their cotangents, and one has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x[:, :3]) + self.second(x[:, 3:])


def test_gradient_norms_of_layers_with_the_same_cotangents() -> None:
    model, x, y = TwoLayers().double(), torch.randn(6, 5).double(), torch.randn(6, 4).double()
    loss = nn.MSELoss(reduction="sum")
    params = tuple(model.parameters())
    grads = [torch.autograd.grad(loss(model(x[[b]]), y[[b]]), params) for b in range(6)]
    expected = torch.stack([torch.cat([g.flatten() for g in every]).norm() for every in grads])
    assert_close(jacfunc.gradient_norms(model, loss)(x, y), expected)


def test_a_loss_of_the_users_finds_the_module_as_it_is() -> None:
    """The module is lent once for an answer, but not while such a loss runs."""
    model, x, y = nn.Linear(3, 2).double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    weight, seen = model.weight, list[bool]()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(model.weight is weight)
        return F.mse_loss(outputs, targets)

    jacfunc.gradient_norms(model, loss)(x, y)
    jacfunc.random_projection(model, 4, loss)(x, y)
    jacfunc.ggn(model, loss)(x, y).diagonal()
    assert len(seen) > 3
    assert all(seen)


def test_several_threads_ask_one_matrix() -> None:
    """The module is lent to one of them at a time."""
    model, x, y = posed("mlp")[0], *posed("mlp")[2:4]
    expected = jacfunc.ggn(model, F.cross_entropy)(x, y).diagonal()
    matrix = jacfunc.ggn(model, F.cross_entropy)(x, y)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: (matrix.diagonal(), matrix.matrix()), range(6)))
    for diagonal, whole in answers:
        for name, block in diagonal.items():
            assert_close(block, expected[name])
        assert_close(whole.diagonal(), torch.cat([b.flatten() for b in expected.values()]))


def sign_matrix(name: str, size: int, **options: int) -> SignMatrix:
    like = torch.zeros((), dtype=torch.float64)
    return SignMatrix(f"0:{name}", size, like, **options)


def random_matrix(model: nn.Module, size: int) -> Tensor:
    named = model.named_parameters()
    return torch.cat([sign_matrix(name, size).rows(p.numel()) for name, p in named])


@EVERY_CASE
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_projections_are_products_with_one_matrix(name: str, chunk_size: int | None) -> None:
    model, case, inputs, targets, true = posed(name)
    matrix = random_matrix(model, 70)
    assert matrix.abs().min() == matrix.abs().max() == torch.tensor(70.0).double().rsqrt()
    found = jacfunc.random_projection(model, 70, chunk_size=chunk_size)(inputs)
    every = torch.cat([x.reshape(len(x), -1, 70) for x in leaves_of(found)], 1)
    assert_close(every, true.jacobian @ matrix)
    shapes = [(*leaf.shape, 70) for leaf in leaves_of(model(inputs))]
    assert [tuple(x.shape) for x in leaves_of(found)] == shapes
    with_loss = jacfunc.random_projection(model, 70, case.loss, chunk_size=chunk_size)
    assert_close(with_loss(inputs, targets), true.gradients @ matrix)


@EVERY_CASE
def test_projections_of_several_draws_a_parameter(name: str) -> None:
    model, _, inputs, _, true = posed(name)
    point = at_batch(model, *(inputs if isinstance(inputs, tuple) else (inputs,)))
    factors = point.between(0, point.size)
    total = torch.zeros_like(true.jacobian @ random_matrix(model, 70))
    start = 0
    for number, leaf in enumerate(factors.sample_outputs):
        of = slice(number, number + 1)
        rows = total[:, start : start + leaf.numel()]

        def project(named: NamedParts, rows: Tensor = rows) -> None:
            for param, parts in named.items():
                zeros = partial(torch.zeros, *rows.shape[:2], *point.params[param].shape)
                signs = sign_matrix(param, 70, at_once=2**13)
                rows += projected(parts, partial(zeros, dtype=rows.dtype), signs)

        point.contracted(factors, shared_units(factors.outputs[of]), project, of)
        start += leaf.numel()
    assert_close(total, true.jacobian @ random_matrix(model, 70))


def test_projections_keep_products() -> None:
    model, inputs = mlp().double(), torch.randn(5, 4).double()
    jacobian = jacfunc.module_jacobian(model, per_sample=True, flat=True)(inputs)[:, 0]
    features = jacfunc.random_projection(model, 20_000, seed=3)(inputs)[:, 0]
    products = jacobian @ jacobian.T
    assert ((features @ features.T - products).abs() < 0.05 * products.max()).all()
    other = jacfunc.random_projection(model, 20_000, seed=4)(inputs)[:, 0]
    assert (features @ other.T).abs().max() < 0.05 * products.max()


# --- Fisher ---


def scores(likelihood: str, outputs: Tensor, draws: int) -> Tensor:
    """Minus the gradients of log likelihoods at targets from the same generator, ``[K, B, C]``."""
    generator = torch.Generator().manual_seed(7)
    if likelihood == "gaussian":
        noise = torch.randn(draws, *outputs.shape, generator=generator, dtype=outputs.dtype)
        targets = outputs - noise
        distribution: Any = torch.distributions.Normal
        arguments: tuple[Any, ...] = (1.0,)
    else:
        chances = outputs.softmax(-1).flatten(0, -2)
        targets = torch.multinomial(chances, draws, True, generator=generator).t()
        targets = targets.reshape(draws, *outputs.shape[:-1])
        distribution, arguments = (lambda x: torch.distributions.Categorical(logits=x)), ()
    found = []
    for target in targets:
        point = outputs.clone().requires_grad_()
        likeliness = distribution(point, *arguments).log_prob(target).sum()
        found.append(-torch.autograd.grad(likeliness, point)[0])
    return torch.stack(found)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize("name", ["mlp", "convolutions", "encoder", "positions"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fisher_is_that_of_its_draws(name: str, likelihood: str, reduction: str) -> None:
    model, _, inputs, _, true = posed(name)
    drawn = scores(likelihood, model(inputs).detach(), 3).flatten(2)
    rows = torch.einsum("kbm,bmp->kbp", drawn, true.jacobian).flatten(0, 1) / math.sqrt(3)
    expected = rows.T @ rows / (len(inputs) if reduction == "mean" else 1)
    for chunk_size in (None, 2):
        found = jacfunc.fisher(
            model,
            likelihood,
            draws=3,
            reduction=reduction,
            generator=torch.Generator().manual_seed(7),
            chunk_size=chunk_size,
        )(inputs)
        assert_close(flat(found.diagonal()), expected.diagonal())
        assert_close(found.matrix(), expected)
        vector = {key: torch.randn_like(param) for key, param in model.named_parameters()}
        assert_close(flat(found @ vector), expected @ flat(vector).detach())


@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_fisher_tends_to_gauss_newton(name: str) -> None:
    model, _, inputs, _, true = posed(name)
    found = jacfunc.fisher(model, "categorical", draws=20_000)(inputs)
    assert_close(flat(found.diagonal()), true.matrix.diagonal(), 0.03)


def test_fisher_moves_the_generator_on() -> None:
    model, inputs = mlp(), torch.randn(5, 4)
    of = jacfunc.fisher(model, "categorical")
    first, second = of(inputs), of(inputs)
    assert not torch.equal(flat(first.diagonal()), flat(second.diagonal()))
    assert torch.equal(flat(first.diagonal()), flat(first.diagonal()))


# --- settings ---


def test_some_parameters() -> None:
    model, case, inputs, targets, true = posed("mlp")
    found = jacfunc.ggn(model, case.loss, select="2.*")(inputs, targets)
    head = slice(30, None)
    assert_close(found.matrix(), true.matrix[head, head])
    assert_close(flat(found.diagonal()), true.matrix.diagonal()[head])
    vector = {key: torch.randn_like(p) for key, p in model.named_parameters() if key[0] == "2"}
    assert_close(flat(found @ vector), true.matrix[head, head] @ flat(vector).detach())
    norms_of = jacfunc.gradient_norms(model, case.loss, select="2.*")
    assert_close(norms_of(inputs, targets), true.gradients[:, head].norm(dim=1))


def test_frozen_parameters_where_they_are_named() -> None:
    model, case, inputs, targets, true = posed("mlp")
    model.requires_grad_(False)
    found = jacfunc.ggn(model, case.loss, select=dict(model.named_parameters()))(inputs, targets)
    vector = {key: torch.randn_like(param) for key, param in model.named_parameters()}
    assert_close(flat(found @ vector), true.matrix @ flat(vector))
    assert_close(flat(found.diagonal()), true.matrix.diagonal())


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_unused_parameters_are_zero() -> None:
    model, inputs, targets = Unused(), torch.randn(5, 4), classes()
    found = jacfunc.ggn(model, F.cross_entropy)(inputs, targets)
    assert found.diagonal()["unused.weight"].equal(torch.zeros(2, 2))
    assert found.blocks()["unused.bias"].equal(torch.zeros(2, 2))
    assert found.matrix()[15:].abs().max() == 0
    vector = {key: torch.ones_like(param) for key, param in model.named_parameters()}
    assert (found @ vector)["unused.bias"].equal(torch.zeros(2))
    assert jacfunc.gradient_norms(model, F.cross_entropy)(inputs, targets).shape == (5,)


class Masked(nn.Module):
    """Inputs by keyword, one of them shared by all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, *, weights: Tensor) -> Tensor:
        return self.layer(x * weights)


def test_inputs_by_keyword_and_shared() -> None:
    model, x, weights, targets = Masked(), torch.randn(5, 4), torch.rand(4), classes()
    found = jacfunc.ggn(model, F.cross_entropy, in_dims={"weights": None})
    plain = nn.Sequential(model.layer)
    expected = jacfunc.ggn(plain, F.cross_entropy)(x * weights, targets)
    diagonal = found(x, targets, weights=weights).diagonal()
    assert torch.allclose(flat(diagonal), flat(expected.diagonal()))
    assert torch.allclose(flat(found(targets, x=x, weights=weights).diagonal()), flat(diagonal))


def test_dropout_has_one_mask_in_all_answers() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    inputs, targets = torch.randn(5, 4).double(), classes()
    for randomness in ("same", "different"):
        found = jacfunc.ggn(model, F.cross_entropy, randomness=randomness)(inputs, targets)
        matrix = found.matrix()
        torch.rand(3)
        vector = {key: torch.randn_like(param) for key, param in model.named_parameters()}
        assert_close(flat(found @ vector), matrix @ flat(vector).detach())
        assert_close(flat(found.diagonal()), matrix.diagonal())
    strict = jacfunc.ggn(model, F.cross_entropy)(inputs, targets)
    with pytest.raises(NotImplementedError, match="ggn: per_sample must know how samples draw"):
        strict.product(vector)
    with pytest.raises(NotImplementedError, match="ggn: per_sample must know how samples draw"):
        strict.diagonal()


def test_dropout_in_chunks() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    inputs, targets = torch.randn(5, 4).double(), classes()
    of = jacfunc.ggn(model, F.cross_entropy, randomness="same", chunk_size=2)
    found = of(inputs, targets)
    vector = {key: torch.randn_like(param) for key, param in model.named_parameters()}
    assert_close(flat(found @ vector), found.matrix() @ flat(vector).detach())
    with pytest.raises(ValueError, match="ggn: with randomness='different' all samples must be"):
        jacfunc.ggn(model, F.cross_entropy, randomness="different", chunk_size=2)


def test_nothing_is_changed() -> None:
    model, inputs, targets = convolutional(), torch.randn(5, 2, 6, 6), classes()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = jacfunc.ggn(model, F.cross_entropy)(inputs, targets)
    found.diagonal()
    found @ {key: torch.ones_like(param) for key, param in model.named_parameters()}
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_without_gradients_and_with_graphs_outside() -> None:
    model, case, inputs, targets, true = posed("mlp")
    inputs.requires_grad_()
    vector = {key: torch.randn_like(param) for key, param in model.named_parameters()}
    for grad_mode in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
        with grad_mode:
            found = jacfunc.ggn(model, case.loss)(inputs, targets)
            assert_close(flat(found @ vector), (true.matrix @ flat(vector)).detach())
            assert_close(flat(found.diagonal()), true.matrix.diagonal())


def test_a_linear_loss_has_no_curvature() -> None:
    found = jacfunc.ggn(mlp(), lambda out, y: (out * y).sum())(torch.ones(5, 4), torch.ones(5, 3))
    assert flat(found.diagonal()).abs().max() == 0
    assert found.matrix().abs().max() == 0


def test_products_of_modules_that_couple_samples() -> None:
    """The matrix of the whole batch is what it is; there are no samples to take apart."""

    def contrast(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out @ out.T, y)

    model, inputs, targets = mlp().double(), torch.randn(5, 4).double(), classes()
    found = jacfunc.ggn(model, contrast)(inputs, targets)
    with pytest.raises(ValueError, match="ggn: the loss must be a sum or mean over samples"):
        found.diagonal()
    jacobian = jacfunc.module_jacobian(model, flat=True)(inputs)
    point = model(inputs).detach()
    hessian: Any = torch.autograd.functional.hessian(lambda out: contrast(out, targets), point)
    vector = {key: torch.randn_like(param) for key, param in model.named_parameters()}
    expected = jacobian.T @ (hessian.view(15, 15) @ (jacobian @ flat(vector).detach()))
    assert_close(flat(found @ vector), expected)


def test_half_precision() -> None:
    model, x, y = mlp(), torch.randn(5, 4), classes()
    vector = {key: torch.randn_like(param) for key, param in model.named_parameters()}
    exact = jacfunc.ggn(model, F.cross_entropy)(x, y)
    features = jacfunc.random_projection(model, 30)(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = jacfunc.ggn(model, F.cross_entropy)(x, y)
        for mine, true in (
            (flat(found.diagonal()), flat(exact.diagonal())),
            (found.matrix(), exact.matrix()),
            (flat(found @ vector), flat(exact @ vector)),
            (jacfunc.random_projection(model, 30)(x), features),
        ):
            assert mine.dtype == torch.float32
            assert_close(mine, true.double(), 0.03)
    halved = jacfunc.ggn(copy.deepcopy(model).bfloat16(), F.cross_entropy)(x.bfloat16(), y)
    assert_close(flat(halved.diagonal()), flat(exact.diagonal()).double(), 0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_holds_norms_whose_squares_it_does_not(dtype: torch.dtype) -> None:
    model, x = nn.Linear(8, 1).to(dtype), torch.full((2, 8), 200.0, dtype=dtype)

    def total(out: Tensor, y: None) -> Tensor:
        return out.sum()

    found = jacfunc.gradient_norms(model, total)(x, None)
    assert found.dtype == dtype
    exact = x.new_tensor([8 * 200.0**2 + 1], dtype=torch.float64).sqrt()
    assert (found.double() - exact).abs().max() <= torch.finfo(dtype).eps / 2 * exact.max()


# --- forms ---


class Own(NamedTuple):
    """A form that a user's rule may return."""

    block: Tensor

    def rows(self) -> Tensor:
        return self.block

    def write(self, block: Tensor) -> None:
        block.copy_(self.block)


def squared(parts: list[Part], param: torch.Tensor, *limit: int) -> torch.Tensor:
    """The squares of one parameter's entries, added up twice and halved."""
    totals: dict[str, torch.Tensor] = {}
    for _ in range(2):
        add_squares(totals, {"param": (parts, param)}, *limit)
    return totals["param"] / 2


def test_squares_of_other_forms() -> None:
    block, param = torch.randn(7, 6, 3, 4).double(), torch.zeros(3, 4).double()
    parts = [Part((), Own(block))]
    assert_close(squared(parts, param), block.square().sum((0, 1)))
    assert_close(norms([(parts, param)]), block.flatten(1).norm(dim=1))


def written(parts: list[Part], shape: tuple[int, ...]) -> Tensor:
    block = torch.zeros(shape, dtype=torch.float64)
    for part in parts:
        part.place_in(block).add_(part.form.rows())
    return block


@pytest.mark.parametrize("positions", [1, 2, 5, 40])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_squares_of_outer_products(positions: int, groups: int, is_transposed: bool) -> None:
    few = 2**10  # bytes, for several chunks of samples
    inputs = torch.randn(7, groups, positions, 4).double()
    cotangents = torch.randn(6, 7, groups, positions, 5).double()
    shape = (groups, 4, 5) if is_transposed else (groups * 5, 4)
    parts = [Part((), Outer(inputs, cotangents, torch.Size(shape), is_transposed))]
    param = torch.zeros(shape, dtype=torch.float64)
    block = written(parts, (7, 6, *shape))
    assert_close(squared(parts, param, few), block.square().sum((0, 1)))
    assert_close(norms([(parts, param)], few), block.flatten(1).norm(dim=1))
    again = [*parts, Part((), Rows(block.transpose(0, 1).clone()))]
    assert_close(squared(again, param, few), (2 * block).square().sum((0, 1)))
    assert_close(norms([(again, param)], few), (2 * block).flatten(1).norm(dim=1))


def test_squares_of_lookups() -> None:
    index = torch.tensor([[0, 1, 1, 1], [2, 0, 2, 3]])
    parts = [Part((), Gather(index, torch.randn(3, 2, 4, 5).double(), torch.Size((6, 5))))]
    param, block = torch.zeros(6, 5).double(), written(parts, (2, 3, 6, 5))
    assert_close(squared(parts, param), block.square().sum((0, 1)))
    assert_close(norms([(parts, param)]), block.flatten(1).norm(dim=1))


# --- refusals ---


def test_refusals_of_losses() -> None:
    x, y = torch.randn(5, 4), classes()
    with pytest.raises(ValueError, match=r"ggn: loss\(outputs, targets\) must be one number.*\(5,"):
        jacfunc.ggn(mlp(), lambda out, y: F.cross_entropy(out, y, reduction="none"))(
            x, y
        ).diagonal()
    with pytest.raises(ValueError, match="ggn: the loss must be convex in the outputs"):
        jacfunc.ggn(mlp(), lambda out, y: out.cos().sum())(x, y).diagonal()
    with pytest.raises(TypeError, match="ggn: the last positional argument must be the targets"):
        jacfunc.ggn(mlp(), F.cross_entropy)(input=x)


def test_refusals_of_vectors() -> None:
    model, x, y = mlp(), torch.randn(5, 4), classes()
    found = jacfunc.ggn(model, F.cross_entropy)(x, y)
    with pytest.raises(ValueError, match=r"ggn: vector must name the chosen parameters, got 0\.w"):
        found @ {"0.bias": torch.ones(6)}
    vector = {key: torch.ones_like(param) for key, param in model.named_parameters()}
    with pytest.raises(ValueError, match="ggn: vector must match in shape"):
        found @ {**vector, "0.bias": torch.ones(5)}
    found @ vector


def test_refusals_of_modules() -> None:
    x, y = torch.randn(5, 4), classes()
    normed = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="gradient_norms: per_sample needs samples that do not"):
        jacfunc.gradient_norms(normed, F.cross_entropy)(x, y)
    with pytest.raises(TypeError, match=r"fisher: module must be an nn\.Module"):
        jacfunc.fisher("a module", "gaussian")
    with pytest.raises(ValueError, match="random_projection: size must be a positive number"):
        jacfunc.random_projection(mlp(), 0)
    with pytest.raises(ValueError, match="fisher: likelihood must be one of 'categorical', 'gaus"):
        jacfunc.fisher(mlp(), "poisson")
    with pytest.raises(ValueError, match="fisher: draws must be a positive number"):
        jacfunc.fisher(mlp(), "gaussian", draws=0)
    with pytest.raises(ValueError, match="fisher: reduction must be 'mean' or 'sum'"):
        jacfunc.fisher(mlp(), "gaussian", reduction="none")
    with pytest.raises(ValueError, match="fisher: with likelihood='categorical' the last dim"):
        jacfunc.fisher(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), "categorical")(x)


class Branching(nn.Module):
    """Its path depends on the data, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out if bool((x.sum() > 1e9).item()) else out.tanh()


def test_what_vmap_refuses_is_evaluated_as_a_batch() -> None:
    x, y, module = torch.randn(5, 4), classes(), Branching()
    got = jacfunc.ggn(module, F.cross_entropy)(x, y).diagonal()
    straight = nn.Sequential(module.layer, nn.Tanh())
    want = jacfunc.ggn(straight, F.cross_entropy)(x, y).matrix().diagonal()
    torch.testing.assert_close(torch.cat([block.flatten() for block in got.values()]), want)


def test_refusals_of_transforms() -> None:
    x, y = torch.randn(5, 4), classes()
    norms_of = jacfunc.gradient_norms(mlp(), F.cross_entropy)
    with pytest.raises(NotImplementedError, match="gradient_norms: the graph of an evaluation"):
        torch.vmap(lambda x: norms_of(x, y))(x[None])


class Averaging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out.mean()


def test_products_where_forward_mode_has_no_rule() -> None:
    """Torch's fused cells have none: the first product is pulled back, as all others are."""
    model, case, inputs, targets, true = posed("lstm")
    found = jacfunc.ggn(model, case.loss)(inputs, targets)
    for _ in range(2):
        vector = dict(model.named_parameters())  # which require gradients
        product = flat(found @ vector)
        assert_close(product.detach(), true.matrix @ flat(vector).detach())
        gradients = torch.autograd.grad(product.square().sum(), tuple(vector.values()))
        twice = true.matrix @ true.matrix @ flat(vector).detach()
        assert_close(torch.cat([g.flatten() for g in gradients]), 2 * twice)


class Once(torch.autograd.Function):
    """The identity, whose backward pass is differentiated no further."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent.clone()


class OncePushed(Once):
    """The identity, which forward mode knows, too."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()


class Applied(nn.Module):
    """The outputs of a module, through a function."""

    def __init__(self, inner: nn.Module, function: type[Once]) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(self.inner(x))


def test_products_where_graphs_are_not_differentiated_again() -> None:
    model, case, inputs, targets, true = posed("mlp")
    for function in (OncePushed, Once):
        applied = Applied(model, function)
        found = jacfunc.ggn(applied, case.loss)(inputs, targets)
        vector = {key: torch.randn_like(param) for key, param in applied.named_parameters()}
        for _ in range(3):
            assert_close(flat(found @ vector), true.matrix @ flat(vector))


def test_refusal_of_outputs_without_a_batch() -> None:
    model = Averaging()
    found = jacfunc.ggn(model, lambda out, y: (out - y).square().sum())(torch.ones(5, 4), 1.0)
    with pytest.raises(ValueError, match="ggn: every output must have the batch in front"):
        found @ {key: torch.ones_like(param) for key, param in model.named_parameters()}


@BY_EITHER
@pytest.mark.parametrize("margin", [10.0, 15.0, 20.0])
def test_a_network_that_is_almost_certain(margin: float, loss: Any) -> None:
    torch.manual_seed(0)
    labels = torch.randint(10, (50,))
    logits = margin * F.one_hot(labels, 10) + torch.randn(50, 10, dtype=torch.float64)
    chances = logits.softmax(1)
    hessians = (torch.diag_embed(chances) - chances.unsqueeze(2) * chances.unsqueeze(1)) / 50
    model = nn.Linear(10, 10, bias=False)
    nn.init.eye_(model.weight)
    x = logits.float()
    expected = torch.einsum("bo,bi->oi", hessians.diagonal(dim1=1, dim2=2), logits.square())
    found = jacfunc.ggn(model, loss)(x, labels).diagonal()["weight"]
    assert (found - expected).abs().max() <= 1e-5 * expected.max()


def of_logits(logits: Tensor, loss: Any) -> tuple[Tensor, Tensor]:
    """The diagonal of a linear layer that passes the logits on, as found and in closed form."""
    size = logits.shape[1]
    chances = logits.double().softmax(1)
    variances = chances * (1 - chances) / len(logits)
    model = nn.Linear(size, size, bias=False)
    nn.init.eye_(model.weight)
    labels = torch.zeros(len(logits), dtype=torch.long)
    found = jacfunc.ggn(model, loss)(logits, labels).diagonal()["weight"]
    return found.double(), variances.T @ logits.double().square()


@BY_EITHER
def test_a_class_that_no_sample_is_likely_to_be_in(loss: Any) -> None:
    logits = torch.randn(20, 10)
    logits[:, 3] -= 14.0
    found, expected = of_logits(logits, loss)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)


@BY_EITHER
def test_one_sample_that_is_certain_among_others(loss: Any) -> None:
    logits = torch.randn(20, 10)
    logits[0, 2] += 30.0
    found, expected = of_logits(logits, loss)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("ignored", [0, 3])
def test_losses_that_see_one_output_of_a_sample(ignored: int) -> None:
    """A root each, whichever it is; of samples that are ignored, none."""
    model, x, chosen = mlp(), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    seen = torch.arange(5) >= ignored

    def loss(out: Tensor, chosen: Tensor) -> Tensor:
        values = out.gather(1, chosen.unsqueeze(1)).squeeze(1)
        return (values.square() * seen.to(values.dtype)).sum() / 2

    found = jacfunc.ggn(model, loss)(x, chosen)
    roots = found.curvature_of(found.point.outputs).roots
    assert [len(root) for root in roots] == [1]
    jacobian = jacfunc.module_jacobian(model, per_sample=True, flat=True)(x)
    rows = jacobian[torch.arange(5), chosen] * seen.unsqueeze(1)
    torch.testing.assert_close(flat(found.diagonal()), rows.square().sum(0))
