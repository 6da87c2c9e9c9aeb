"""Rows and columns that are written down after sixteen settled calls, and what they hold for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
from torch import Tensor, nn
from torch.nn import functional as F

import jacfunc
from jacfunc._linear_map import graph, push
from jacfunc._traces import FEWEST_CALLS, saved
from jacfunc.strategies._rows import SettledRows
from jacfunc.testing import known_machine
from tests.house.calls import num_calls
from tests.strategies.test_settled import looped_jacobian

CALLS = 30  # until rows are written down
X = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
W = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]], dtype=torch.float64)
IMAGE = torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6)
KERNEL = torch.linspace(-1, 1, 18, dtype=torch.float64).view(2, 1, 3, 3)

Func = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _same_plans() -> Iterator[None]:
    with known_machine():
        yield


def is_replayed(derive: Callable[[Tensor], Any], x: Tensor = X) -> bool:
    """Is no graph swept in a call, and no tangent pushed?"""
    sweeps = graph._run_backward.__code__, push.pushed_tensor.__code__, push.pushforward.__code__

    def is_sweep(frame: Any, event: str, _: Any) -> bool:
        return event == "call" and frame.f_code in sweeps

    return not num_calls(lambda: derive(x), is_sweep)


def written(derive: Callable[[Tensor], Any], x: Tensor = X) -> Callable[[Tensor], Any]:
    """The derivative, after so many calls that its rows are written down."""
    for _ in range(CALLS):
        derive(x)
    assert is_replayed(derive, x)
    return derive


def convolved(x: Tensor) -> Tensor:
    return F.max_pool2d(F.conv2d(x[None, None], KERNEL, padding=1).relu(), 2)


FUNCTIONS: dict[str, tuple[Func, Tensor]] = {
    "a product": (lambda x: W @ x, X),
    "layers": (lambda x: torch.tanh(W.T @ torch.tanh(W @ x)), X),
    "one number": (lambda x: (W @ x).square().sum() + x.cos().sum(), X),
    "a sum": (lambda x: x.sum(), X),
    "numbers": (lambda x: 2.5 * x * (1 - x) - x / 3, X),
    "a multiple": (lambda x: 2 * x, X),
    "expanded": (lambda x: x[None].expand(4, 3).cos(), X),
    "written into": (lambda x: x.mul_(2).sin_(), X),
    "parts": (lambda x: torch.cat([x[1:], x[:2] * x[0]]), X),
    "stacked": (lambda x: torch.stack([x, x.exp()]), X),
    "softmax": (lambda x: torch.softmax(W.T @ W @ x, 0), X),
    "shapes": (lambda x: (x[:, None] * x[None]).sum(0), X),
    "convolutions": (convolved, IMAGE),
}


@pytest.mark.parametrize(
    "strategy", ["reverse", "forward", "auto", jacfunc.Looped("rows")], ids=str
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_that_are_written_down_are_exact(name: str, strategy: Any) -> None:
    f, x = FUNCTIONS[name]
    derive = jacfunc.jacobian(f, strategy=strategy)
    for _ in range(CALLS):
        derive(x)
    if strategy in ("reverse", "forward"):
        assert is_replayed(derive, x)
    for step in range(3):
        at = x + step / 4
        result = derive(at)
        assert not result.requires_grad
        torch.testing.assert_close(result, looped_jacobian(f, at))
        assert at.equal(x + step / 4)
        result.zero_()  # it is the caller's own


@pytest.mark.parametrize("strategy", ["reverse", "forward"])
@pytest.mark.parametrize("grad_mode", [False, True])
def test_the_value_comes_of_the_same_evaluation(grad_mode: bool, strategy: str) -> None:
    count = 0

    def f(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return torch.tanh(W @ x)

    with torch.set_grad_enabled(grad_mode):
        both = jacfunc.value_and_jacobian(f, strategy=strategy)
        for _ in range(CALLS):
            both(X)
        count = 0
        value, jacobian = both(X + 1)
    assert count == 1
    torch.testing.assert_close(value, torch.tanh(W @ (X + 1)))
    torch.testing.assert_close(jacobian, (1 - value**2)[:, None] * W)
    assert not value.requires_grad
    assert not jacobian.requires_grad


def constant(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def by_sizes(x: Tensor, size: Any) -> Tensor:
    return torch.cat([constant(*range(size)), x, constant(*range(5 - size))])[1:5].sin()


def moved(x: Tensor, where: Any) -> Tensor:
    """What is saved before, and after, has the same kinds."""
    for _ in range(where):
        x * W[0]
    out = (x.sin() * W[1]).sum()
    for _ in range(2 - where):
        x * W[0]
    return out


def hooked(x: Tensor, factor: Any) -> Tensor:
    out = W @ x
    if factor > 1:
        out.register_hook(lambda u: factor * u)
    return out.sin()


def hooked_at_a_node(x: Tensor, factor: Any) -> Tensor:
    out = W @ x
    node: Any = out.grad_fn
    if factor > 1 and node is not None:
        node.register_prehook(lambda us: (factor * us[0],))
    return out.sin()


def packed(x: Tensor, offset: Any) -> Tensor:
    if not offset:
        return x.sin()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t + offset, lambda t: t):
        return x.sin()


def broadcast(x: Tensor, lead: Any) -> Tensor:
    """Shapes that nothing saves, and which backward passes sum up to."""
    return (x.reshape(lead) + 0 * x[0]).sum(0)[..., 0] * 1.0


def written_after(x: Tensor, factor: Any) -> Tensor:
    c = W.clone()
    out = c @ x
    if factor == 1:
        return out
    return (c * factor) @ x


CHANGES: dict[str, tuple[Callable[[Tensor, Any], Tensor], tuple[Any, Any]]] = {
    "a constant": (lambda x, c: c * x.sin(), (constant(1, 2, 3), constant(4, 5, 6))),
    "its shape": (lambda x, c: (c * x).sum(0), (torch.ones(2, 3), torch.ones(4, 3))),
    "its dtype": (lambda x, c: c * x, (torch.ones(3).double(), 2 * torch.ones(3))),
    "its strides": (lambda x, c: c @ x, (W.clone(), W.T.clone().T * 2)),
    "a number": (lambda x, c: c * x.sin() / c**3, (2.0, 3.0)),
    "a kind of number": (lambda x, c: c * x.sin(), (2.0, constant(2, 1, 3))),
    "an exponent": (lambda x, c: x**c, (2, 3)),
    "a part": (lambda x, c: x[c : c + 2].sin(), (0, 1)),
    "an index": (lambda x, c: x[c].sin(), (constant(0, 1).long(), constant(2, 1).long())),
    "an order": (lambda x, c: x.view(1, 3).expand(3, 3).diagonal(c).cos(), (1, -1)),
    "a branch": (lambda x, c: x.sin() if c else x.cos(), (True, False)),
    "a branch alike": (lambda x, c: W[0] * x if c else W[1] * x, (True, False)),
    "sizes of what is joined": (by_sizes, (2, 3)),
    "what is saved beside": (moved, (0, 2)),
    "a hook": (hooked, (1, 7.0)),
    "a hook at a node": (hooked_at_a_node, (1, 7.0)),
    "hooks on what is saved": (packed, (0, 1)),
    "a shape between": (broadcast, ((3, 1, 1), (1, 3, 1))),
    "what was made": (written_after, (1, 3.0)),
    "a slope": (F.leaky_relu, (0.1, 0.3)),
    "dropout": (lambda x, c: torch.native_dropout(x * 1, 0.0, c)[0] * W[0], (False, True)),
    "detached": (lambda x, c: x * (x.detach() if c else x), (True, False)),
    "a dim": (lambda x, c: torch.softmax(x[:, None] * W[0], c), (0, 1)),
}


@pytest.mark.parametrize("strategy", ["reverse", "auto", jacfunc.Looped("rows")], ids=str)
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_calls_is_seen(name: str, strategy: Any) -> None:
    check_changes(name, strategy)


def check_changes(name: str, strategy: Any) -> None:
    """Jacobians are those of the function as it is, when it changes after many calls, and back."""
    f, (before, after) = CHANGES[name]
    now: Any = before
    derive = jacfunc.jacobian(lambda x: f(x, now), strategy=strategy)
    for _ in range(CALLS):
        derive(X)
    for value in (before, after, after, before, after, after, after, after, before):
        now = value
        expected = looped_jacobian(lambda x, value=value: f(x, value), X + 1)
        torch.testing.assert_close(derive(X + 1), expected)


def test_a_function_that_branches_stays_written_down() -> None:
    is_sine = True
    derive = written(jacfunc.jacrev(lambda x: x.sin() if is_sine else x.cos()))
    for _ in range(3):
        is_sine = False
        torch.testing.assert_close(derive(X), looped_jacobian(torch.cos, X))
        is_sine = True
        assert is_replayed(derive)
    is_sine = False
    for _ in range(3):
        derive(X)  # so many in a row that it is swept from now on
    is_sine = True
    assert not is_replayed(derive)
    torch.testing.assert_close(derive(X), looped_jacobian(torch.sin, X))


def test_hooks_in_every_call_are_run() -> None:
    derive = jacfunc.jacrev(lambda x: hooked(x, 3.0))
    for _ in range(CALLS):
        derive(X)
    torch.testing.assert_close(derive(X), 3 * (W @ X).cos()[:, None] * W)


class Doubled(torch.autograd.Function):
    """A function of a user's, whose backward pass depends on what no graph shows."""

    factor = 2.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Doubled.factor * x

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return Doubled.factor * cotangents[0]


def test_code_of_a_user_in_a_backward_pass_is_never_written_down() -> None:
    derive = jacfunc.jacrev(lambda x: Doubled.apply(x).sin())
    for _ in range(CALLS):
        derive(X)
    assert not is_replayed(derive)
    Doubled.factor = 3.0
    try:
        torch.testing.assert_close(derive(X), torch.diag(3 * (3 * X).cos()))
    finally:
        Doubled.factor = 2.0


def test_a_write_into_what_is_saved_is_refused_as_torch_does() -> None:
    writes = False
    c = W[0].clone()

    def f(x: Tensor) -> Tensor:
        out = c * x
        if writes:
            c.mul_(1.0)
        return out

    derive = written(jacfunc.jacrev(f))
    writes = True
    for _ in range(5):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            derive(X)
    writes = False
    torch.testing.assert_close(derive(X), torch.diag(W[0]))


def test_what_saves_too_much_is_swept() -> None:
    many = 1
    derive = written(jacfunc.jacrev(lambda x: (x[0] * torch.arange(many).double()).sum() * x))
    many = 9 * 2**20
    for _ in range(2):
        torch.testing.assert_close(derive(X)[1, 1], X[0] * (many * (many - 1) // 2))
    many = 3
    f = lambda x: (x[0] * torch.arange(3).double()).sum() * x  # noqa: E731
    torch.testing.assert_close(derive(X), looped_jacobian(f, X))


def test_what_requires_gradients_later_is_differentiated() -> None:
    c = W[0].clone()
    derive = written(jacfunc.jacrev(lambda x: c * x.sin()))
    c.requires_grad_()
    result = derive(X)
    assert result.requires_grad
    (gradient,) = torch.autograd.grad(result.sum(), c)
    torch.testing.assert_close(gradient, X.cos())


def test_settings_of_torch_are_those_of_the_call() -> None:
    x, weights = X.float(), torch.linspace(-1, 1, 12).view(4, 3)
    derive = written(jacfunc.jacrev(lambda x: torch.ones(3) * x), x)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(derive(x), torch.eye(3, dtype=torch.float64))
    finally:
        torch.set_default_dtype(default)
    derive = written(jacfunc.jacrev(lambda x: weights @ x), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(derive(x), weights)
        torch.testing.assert_close(derive(x), weights.bfloat16().float())
    torch.testing.assert_close(derive(x), weights)


def test_what_others_look_at_is_swept() -> None:
    derive = written(jacfunc.jacrev(lambda x: W @ x))
    points = torch.stack([X, X + 1])
    torch.testing.assert_close(torch.vmap(derive)(points), W.expand(2, 2, 3))
    again = derive(X.clone().requires_grad_())
    torch.testing.assert_close(again, W)
    assert is_replayed(derive)


@pytest.mark.parametrize("strategy", ["reverse", "forward"])
def test_random_numbers_are_those_of_a_plain_call(strategy: str) -> None:
    draws = False

    def f(x: Tensor) -> Tensor:
        return x.sin() * (torch.rand(3, dtype=torch.float64) if draws else W[0])

    derive = written(jacfunc.jacobian(f, strategy=strategy))
    draws = True
    torch.manual_seed(0)
    first = derive(X)
    torch.manual_seed(0)
    factor = torch.rand(3, dtype=torch.float64)
    torch.testing.assert_close(first, torch.diag(X.cos() * factor))


@pytest.mark.parametrize("strategy", ["reverse", "auto", jacfunc.Looped("rows")], ids=str)
@pytest.mark.parametrize("sets_hooks", [False, True], ids=["", "sets hooks"])
def test_a_way_that_is_drawn_is_drawn_once_a_call(strategy: Any, sets_hooks: bool) -> None:
    """Drawn anew where another way is written down, rare ways would be taken more rarely."""
    way, draws = "sine", 0

    def f(x: Tensor) -> Tensor:
        nonlocal draws
        draws += 1
        if way == "sine":
            return x.sin()
        y = x.cos()
        if sets_hooks:
            y.register_hook(lambda gradient: 2 * gradient)
        return y * 3

    derive = written(jacfunc.jacobian(f, strategy=strategy))
    for way in ("cosine", "sine", "cosine", "cosine", "sine", "cosine", "sine"):
        draws = 0
        slopes = X.cos() if way == "sine" else -(6 if sets_hooks else 3) * X.sin()
        torch.testing.assert_close(derive(X), torch.diag(slopes))
        assert draws == 1


def test_another_way_takes_the_random_numbers_of_a_plain_call() -> None:
    draws = False
    derive = written(jacfunc.jacrev(lambda x: x.sin() * (torch.rand(()) if draws else 2.0)))
    draws = True
    torch.manual_seed(0)
    jacobian, following = derive(X), torch.rand(())
    torch.manual_seed(0)
    torch.testing.assert_close(jacobian, torch.diag(X.cos() * torch.rand(())))
    assert torch.equal(torch.rand(()), following)


def test_a_function_that_torch_transforms_inside_is_exact() -> None:
    derive = jacfunc.jacrev(lambda x: torch.func.grad(lambda y: (W @ y).sin().sum())(X) * x)
    for _ in range(CALLS):
        derive(X)
    expected = torch.diag(W.T @ (W @ X).cos())
    torch.testing.assert_close(derive(X + 1), expected)


def test_a_network_without_gradients_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    derive = jacfunc.jacrev(lambda x: model(x))
    with torch.no_grad():
        for _ in range(CALLS):
            derive(X)
        for parameter in model.parameters():
            parameter.mul_(2)
        result = derive(X)
    torch.testing.assert_close(result, looped_jacobian(model, X))


def test_rows_in_threads() -> None:
    derive = written(jacfunc.jacrev(lambda x: torch.tanh(W @ x)))

    def many(step: int) -> None:
        for number in range(30):
            at = X + step + number / 10
            expected = (1 - torch.tanh(W @ at) ** 2)[:, None] * W
            torch.testing.assert_close(derive(at), expected)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(many, range(4)))


def test_of_two_ways_to_take_rows_the_faster_one_is_written_down() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(b, a) / a**0.5 for a, b in pairwise((1024, 64, 64, 4))]

    def f(x: Tensor) -> Tensor:
        for weight in weights:
            x = torch.tanh(weight @ x)
        return x

    x = torch.randn(1024)
    expected = looped_jacobian(lambda y: f(y.float()).double(), x.double()).float()
    loop = jacfunc.Looped("rows").sweeps  # if nothing else is known
    rows = SettledRows(f, 1, torch.Size([4]), False, True, (jacfunc.Reverse().sweeps, loop))
    for _ in range(FEWEST_CALLS):
        known = rows.at(x)
        assert known is not None
    assert rows._written is not None
    known = rows.at(x)
    assert known is not None
    out, block = known
    torch.testing.assert_close(out, f(x))
    torch.testing.assert_close(block, expected, rtol=1e-4, atol=1e-5)


def test_many_rows_one_by_one_are_not_written_down() -> None:
    derive = jacfunc.jacobian(lambda x: x.sin(), strategy=jacfunc.Looped("rows"))
    for _ in range(CALLS):
        derive(torch.ones(40))
    assert not is_replayed(derive, torch.ones(40))


def test_nodes_that_hide_what_they_keep_are_known() -> None:
    """All that torch's own table of derivatives saves is told, but for what is told elsewhere."""
    pytest.importorskip("torchgen.packaged.autograd")
    from torchgen.packaged.autograd.gen_autograd_functions import get_infos_with_derivatives_list
    from torchgen.packaged.autograd.load_derivatives import load_derivatives

    tables = Path(torchgen.__file__).parent / "packaged"
    native = tables / "ATen" / "native"
    infos, _ = load_derivatives(
        str(tables / "autograd" / "derivatives.yaml"),
        str(native / "native_functions.yaml"),
        str(native / "tags.yaml"),
    )
    told = "ScalarType", "TypeAndSize", "TensorOptions", "Layout"  # of neighbours, or of tensors
    hiding = set()
    for info in get_infos_with_derivatives_list(infos):
        kind = getattr(torch._C._functions, info.op, None)
        if kind is None:
            continue
        for attribute in (*info.all_saved_inputs, *info.all_saved_outputs):
            name = getattr(attribute.nctype.name, "name", attribute.nctype.name)
            of = attribute.nctype.type.cpp_type()
            if f"_saved_{name}" not in dir(kind) and not of.strip(">").endswith(told):
                hiding.add(info.op)
    assert hiding == {*saved._HIDING}
