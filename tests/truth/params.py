"""Functions of parameters and a batch, with trees of many kinds, and their Jacobians by loops."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.truth.oracles import float_leaves, looped_jacobian

B = 5


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor | None


@dataclass
class Scale:
    factor: Tensor


class FunctionCase(NamedTuple):
    """A function that takes parameters and a batch ``[B, 3]``, and returns ``[B, 2]``.

    Args:
        params: makes the tree of parameters.
        names: of its floating leaves.
    """

    func: Callable[[Any, Tensor], Tensor]
    params: Callable[[], Any]
    names: list[str]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def affine(params: Any, x: Tensor) -> Tensor:
    return torch.sin(x @ params["w"] + params["b"])


def of_layers(params: Any, x: Tensor) -> Tensor:
    for weight, bias in params["layers"]:
        x = torch.tanh(nn.functional.linear(x, weight, bias))
    return x * params["scale"].factor * params["times"] + params["index"].sum()


def nested() -> dict[str, Any]:
    return {
        "layers": [Layer(numbers(4, 3), numbers(4)), Layer(numbers(2, 4), None)],
        "scale": Scale(numbers()),
        "times": 2.0,
        "index": torch.arange(3),
        "note": "no tensor",
    }


def tied() -> dict[str, Tensor]:
    weight = numbers(3, 2)
    return {"a": weight, "b": weight, "c": numbers(2, 2)}


NETWORK = nn.Sequential(
    *(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2)),
).double()


def of_network(params: dict[str, Tensor], x: Tensor) -> Tensor:
    out: Tensor = functional_call(NETWORK, params, (x,))
    return out


def of_network_and_itself(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Beside the network at its own parameters, which are constants here."""
    return of_network(params, x) + NETWORK(x)


CASES = {
    "a tensor": FunctionCase(lambda p, x: torch.sin(x @ p), lambda: numbers(3, 2), ["params"]),
    "a tuple": FunctionCase(
        lambda p, x: torch.sin(x @ p[0] + p[1]), lambda: (numbers(3, 2), numbers(2)), ["0", "1"]
    ),
    "a dict": FunctionCase(affine, lambda: {"w": numbers(3, 2), "b": numbers(2)}, ["w", "b"]),
    "parameters": FunctionCase(
        affine,
        lambda: OrderedDict(
            w=nn.Parameter(numbers(3, 2)), b=nn.Parameter(numbers(2), requires_grad=False)
        ),
        ["w", "b"],
    ),
    "a UserDict": FunctionCase(affine, lambda: UserDict(w=numbers(3, 2), b=numbers(2)), ["w", "b"]),
    "results of operations": FunctionCase(
        affine,
        lambda: {"w": nn.Parameter(numbers(3, 2)) * 1.0, "b": numbers(2).requires_grad_()},
        ["w", "b"],
    ),
    "one tensor twice": FunctionCase(
        lambda p, x: torch.tanh(x @ p["a"] @ p["c"]) @ p["b"].T @ p["a"], tied, ["a", "b", "c"]
    ),
    "keys with dots": FunctionCase(
        lambda p, x: torch.sin(x @ p["a.b"] + p["a"]["b"]),
        lambda: {"a.b": numbers(3, 2), "a": {"b": numbers(2)}},
        ["['a.b']", "['a']['b']"],
    ),
    "nested": FunctionCase(
        of_layers,
        nested,
        ["layers.0.weight", "layers.0.bias", "layers.1.weight", "scale.factor"],
    ),
    "functional_call": FunctionCase(
        of_network, lambda: dict(NETWORK.named_parameters()), [*dict(NETWORK.named_parameters())]
    ),
    "its own parameters": FunctionCase(
        of_network_and_itself,
        lambda: dict(NETWORK.named_parameters()),
        [*dict(NETWORK.named_parameters())],
    ),
}


def rows_of(case: FunctionCase, params: Any, x: Tensor) -> Tensor:
    """``[B, 2, P]``: each sample as a batch of one, a backward pass a row."""
    samples = []
    for sample in x.unbind():
        of_one = looped_jacobian(lambda p, s=sample: case.func(p, s.unsqueeze(0))[0], (params,))
        samples.append(torch.cat([block.reshape(2, -1) for block in float_leaves(of_one)], 1))
    return torch.stack(samples)


def like(params: Any, flat: Tensor) -> list[Tensor]:
    """The floating leaves that numbers in a row stand for."""
    leaves = float_leaves(params)
    parts = flat.split([leaf.numel() for leaf in leaves])
    return [part.view_as(leaf) for part, leaf in zip(parts, leaves, strict=True)]
