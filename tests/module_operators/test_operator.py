"""The Jacobian of a module as a linear operator, beside rows of plain backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import jacfunc
from tests.kinds.modules import floats


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def cnn() -> nn.Module:
    layers = nn.Conv2d(1, 2, 3), nn.GroupNorm(2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)
    return nn.Sequential(*layers).double()


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        states, (last, _) = self.cell(x)
        return {"states": states, "last": last[0]}


def looped(outputs: Any, leaves: list[Tensor]) -> Tensor:
    """``[M, N]``, a backward pass a row."""
    flat = torch.cat([out.flatten() for out in outputs])
    rows = [
        torch.autograd.grad(entry, leaves, retain_graph=True, materialize_grads=True)
        for entry in flat
    ]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (4, 3)),
    "cnn": (cnn, (2, 1, 5, 5)),
    "batch norm in train mode": (batch_norm, (5, 3)),
    "lstm": (lambda: Recurrent().double(), (2, 4, 3)),
    "attention": (
        lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True).double(),
        (2, 3, 4),
    ),
}
WRT: list[Any] = ["params", "inputs", ("params", "inputs")]


@pytest.mark.parametrize("wrt", WRT, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_products_are_those_of_the_matrix(name: str, wrt: Any) -> None:
    make, shape = MODULES[name]
    module, x = make(), floats(*shape)
    point = x.clone().requires_grad_()
    output = module(point)
    outputs = list(output.values()) if isinstance(output, dict) else [output]
    of = {"params": [*module.parameters()], "inputs": [point]}
    words = (wrt,) if isinstance(wrt, str) else wrt
    expected = looped(outputs, [leaf for word in words for leaf in of[word]])

    J = jacfunc.module_operator(module, wrt)(x)
    assert J.shape == expected.shape
    V, U = floats(J.shape[1], 3), floats(J.shape[0], 3)
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(J @ V, expected @ V, **close)  # tangents, before there is a graph
    torch.testing.assert_close(J.T @ U, expected.T @ U, **close)
    torch.testing.assert_close(J @ V, expected @ V, **close)  # on the graph of a pullback
    torch.testing.assert_close(J.matrix(), expected, **close)
    gap = (U[:, 0] * (J @ V[:, 0])).sum() - ((J.T @ U[:, 0]) * V[:, 0]).sum()
    assert abs(gap) < 1e-10


def test_vectors_have_the_names_of_parameters() -> None:
    module, x = mlp(), floats(4, 3)
    J = jacfunc.module_operator(module, select="2.*")(x)
    assert J.domain.names == ("2.weight", "2.bias")
    gradient = J.rmv(torch.ones(4, 2, dtype=torch.float64))
    module(x).sum().backward()
    for name, block in gradient.items():
        torch.testing.assert_close(block, module.get_parameter(name).grad)
    torch.testing.assert_close(J.outputs, module(x).detach())


def test_the_point_is_that_of_the_call() -> None:
    module, x = mlp(), floats(4, 3)
    J = jacfunc.module_operator(module)(x)
    before = J.matrix()
    v = floats(J.shape[1])
    with torch.no_grad():
        for param in module.parameters():
            param.data.mul_(2)
        x.zero_()
    torch.testing.assert_close(J @ v, before @ v)
    torch.testing.assert_close(J.matrix(), before)
    fresh = jacfunc.module_operator(module)(x)
    assert not torch.equal(fresh.matrix(), before)


def test_the_module_is_left_as_it_was() -> None:
    module, x = batch_norm(), floats(5, 3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    J = jacfunc.module_operator(module)(x)
    J @ floats(J.shape[1])
    J.T @ floats(J.shape[0])
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(param.grad is None for param in module.parameters())
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state) or module.training


class Counted(nn.Module):
    """Counts its evaluations."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, [0]

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(len(x))
        out: Tensor = self.net(x)
        return out


CALLS: list[int] = []


def test_pullbacks_evaluate_once() -> None:
    module, x = Counted(mlp()), floats(4, 3)
    CALLS.clear()
    J = jacfunc.module_operator(module)(x)
    for _ in range(5):
        J.T @ floats(J.shape[0])
    J.T @ floats(J.shape[0], 7)
    assert CALLS == [4]
    J @ floats(J.shape[1])  # the graph of the pullback
    J @ floats(J.shape[1])
    assert CALLS == [4]


def test_rows_that_are_asked_for_are_all_that_is_swept() -> None:
    module, x = mlp(), floats(4, 3)
    J = jacfunc.module_operator(module)(x)
    chosen = J.restrict(rows=[1, -1, 4])
    torch.testing.assert_close(chosen.matrix(), J.matrix()[[1, 7, 4]])


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_value_and_products_have_one_dropout_mask(randomness: Any) -> None:
    module = nn.Sequential(nn.Linear(3, 8, bias=False), nn.Dropout(0.5)).double()
    x = floats(5, 3)
    operator_of = jacfunc.module_operator(module, per_sample=True, randomness=randomness)
    J = operator_of(x)
    # linear in its parameters, so that J w is the value itself
    weights = {"0.weight": module[0].weight.detach()}
    torch.testing.assert_close(J @ weights, J.outputs)
    torch.testing.assert_close(
        J.rmv(J.outputs)["0.weight"], J.matrix().mT.mv(J.outputs.flatten()).view(8, 3)
    )
    is_zero = J.outputs == 0
    assert bool((is_zero == is_zero[0]).all()) == (randomness == "same")


# --- over batches ---


class Rows(Dataset[Tensor]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, n: int) -> Tensor:
        return self.x[n]


def loaders(x: Tensor) -> dict[str, Iterable[Any]]:
    return {
        "list": [x[:4], x[4:8], x[8:]],
        "loader": DataLoader(Rows(x), batch_size=4),
        "tuples": [(x[:4],), (x[4:],)],
        "shuffled": DataLoader(Rows(x), batch_size=4, shuffle=True),
    }


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", ["list", "loader", "tuples"])
def test_batches_are_below_each_other(name: str, per_sample: bool) -> None:
    module, x = mlp(), floats(10, 3)
    whole = jacfunc.module_operator(module)(x)
    J = jacfunc.module_operator(module, per_sample=per_sample)(loaders(x)[name])
    V, U = floats(J.shape[1], 3), floats(J.shape[0], 3)
    torch.testing.assert_close(J @ V, whole @ V)
    torch.testing.assert_close(J.T @ U, whole.T @ U)
    torch.testing.assert_close(J.matrix(), whole.matrix())


def test_a_shuffled_loader_has_one_order_for_all_products() -> None:
    module, x = mlp(), floats(10, 3)
    J = jacfunc.module_operator(module)(loaders(x)["shuffled"])
    matrix, V, U = J.matrix(), floats(J.shape[1], 2), floats(J.shape[0], 2)
    torch.rand(5)
    torch.testing.assert_close(J @ V, matrix @ V)
    torch.testing.assert_close(J.T @ U, matrix.T @ U)
    whole = jacfunc.module_operator(module)(x).matrix()
    assert not torch.equal(matrix, whole)
    torch.testing.assert_close(matrix.sort(0).values, whole.sort(0).values)


def test_every_pass_goes_through_the_progress_bar() -> None:
    passes = []

    def watched(batches: Any) -> Any:
        passes.append(len(batches))
        return batches

    module, x = mlp(), floats(10, 3)
    J = jacfunc.module_operator(module, progress=watched)(loaders(x)["list"])
    J @ floats(J.shape[1])
    J.T @ floats(J.shape[0], 4)
    assert passes == [3, 3, 3]


class Augmented(Rows):
    """Draws from a generator of its own, as NumPy's augmentations do."""

    generator = np.random.default_rng(0)

    def __getitem__(self, n: int) -> Tensor:
        return self.x[n] + self.generator.normal()


def test_batches_that_change_are_refused() -> None:
    module, x = mlp(), floats(10, 3)
    operator_of = jacfunc.module_operator(module)
    J = operator_of(DataLoader(Augmented(x), batch_size=4))
    with pytest.raises(ValueError, match=r"same batches in .* another one in place 0"):
        J @ floats(J.shape[1])
    used_up = operator_of(iter([x[:5], x[5:]]))
    with pytest.raises(ValueError, match="got 0 batches, and 2 at the first pass"):
        used_up.T @ floats(used_up.shape[0])
    growing = [x[:5]]
    J = operator_of(growing)
    growing.append(x[5:])
    with pytest.raises(ValueError, match="another one in place 1"):
        J @ floats(J.shape[1])


# --- functions ---


def test_a_function_of_batches() -> None:
    def predict(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x @ params["w"])

    params, x = {"w": floats(3, 2)}, floats(4, 3)
    J = jacfunc.module_operator(predict, per_sample=True)(params, x)
    slopes = 1 - torch.tanh(x @ params["w"]) ** 2
    expected = torch.einsum("bi,bo,op->boip", x, slopes, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(J.matrix(), expected.reshape(8, 6))
    assert list(J.rmv(torch.ones(4, 2, dtype=torch.float64))) == ["w"]


# --- what is refused ---


def test_what_torch_can_push_in_no_way_takes_rows() -> None:
    class Cube(torch.autograd.Function):
        """Of the old style, without a second derivative."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 3 * x**2 * grad

    class Cubed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(floats(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = Cube.apply(x @ self.weight)
            return out

    module, x = Cubed(), floats(4, 3)
    J = jacfunc.module_operator(module)(x)
    v = floats(6)
    torch.testing.assert_close(J @ v, looped([module(x)], [module.weight]) @ v)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "wrt": (
        lambda: jacfunc.module_operator(mlp(), "weights"),  # type: ignore[arg-type]
        ValueError,
        "wrt must be 'params', 'inputs' or a tuple of both, got 'weights'",
    ),
    "progress": (
        lambda: jacfunc.module_operator(mlp(), progress=3),  # type: ignore[arg-type]
        TypeError,
        "progress must be a function that wraps a sequence, got int",
    ),
    "a vector of another size": (
        lambda: jacfunc.module_operator(mlp())(floats(4, 3)) @ floats(5),
        ValueError,
        r"vector must have 32 numbers in its first dimension, got shape \(5,\)",
    ),
    "a vector of another dtype": (
        lambda: jacfunc.module_operator(mlp())(floats(4, 3)) @ floats(32).float(),
        TypeError,
        "vector must match in dtype, a flat vector being torch.float64, got torch.float32",
    ),
    "a vector of other names": (
        lambda: jacfunc.module_operator(mlp())(floats(4, 3)) @ {"weight": floats(5)},
        ValueError,
        "vector must be a flat tensor of 32 numbers or have the structure",
    ),
    "no batch": (
        lambda: jacfunc.module_operator(mlp())([]),
        ValueError,
        "there must be at least one batch, got an iterable of none",
    ),
    "batches of other shapes": (
        lambda: jacfunc.module_operator(nn.Identity(), "inputs")([floats(2, 3), floats(2, 4)]),
        ValueError,
        "outputs of all batches must have one shape but for the samples",
    ),
    "inside a transform": (
        lambda: torch.func.vmap(jacfunc.module_operator(mlp()))(floats(2, 4, 3)),
        NotImplementedError,
        "got a call inside a transform",
    ),
    "random inputs": (
        lambda: jacfunc.module_operator(mlp(), "inputs", per_sample=True, randomness="same")(
            floats(4, 3)
        ),
        NotImplementedError,
        "by inputs each sample must draw numbers of its own, got randomness='same'",
    ),
    "a frozen module": (
        lambda: jacfunc.module_operator(mlp().requires_grad_(False))(floats(4, 3)),
        ValueError,
        "at least one tensor, got a module without parameters that require gradients",
    ),
    "a coupled batch": (
        lambda: jacfunc.module_operator(batch_norm(), per_sample=True)(floats(4, 3)),
        ValueError,
        "got batch normalization over the batch in 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, words = BAD[name]
    with pytest.raises(error, match=f"^module_operator: .*{words}"):
        call()


def test_a_loss_trains_through_the_vector() -> None:
    """Products can be differentiated by their vectors: of a linear map the gradient is known."""
    module, x = mlp(), floats(4, 3)
    J = jacfunc.module_operator(module)(x)
    matrix, v, target = J.matrix(), floats(32).requires_grad_(), floats(8)
    F.mse_loss(J @ v, target, reduction="sum").backward()
    torch.testing.assert_close(v.grad, 2 * matrix.T @ (matrix @ v.detach() - target))


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("is_inside", [True, False])
def test_products_are_cast_as_the_value_was(copy, is_inside):
    """Autocast as it was at the batch, whatever it is where products are asked for."""
    model, batch = mlp().float(), torch.randn(4, 3)
    vector = torch.ones(sum(p.numel() for p in model.parameters()))
    with torch.autocast("cpu", torch.bfloat16, enabled=is_inside):
        operator = jacfunc.module_operator(model, copy=copy)(batch)
        output = model(batch)
        slopes = torch.func.jvp(
            lambda params: torch.func.functional_call(model, params, (batch,)),
            (dict(model.named_parameters()),),
            ({name: torch.ones_like(p) for name, p in model.named_parameters()},),
        )[1]
    with torch.autocast("cpu", torch.bfloat16, enabled=not is_inside):
        product = operator @ vector
    assert product.dtype == output.dtype
    torch.testing.assert_close(product, slopes.flatten(), rtol=0, atol=0)
