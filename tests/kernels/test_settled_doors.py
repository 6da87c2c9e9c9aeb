"""Kernels, curvatures, norms and projections of kinds of calls that earlier ones have settled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from tests.modules.test_settled_layers import (
    BEFORE,
    CHANGES,
    COUNT,
    HIDDEN,
    KINDS,
    Network,
    calls_until_compared,
    points,
)
from tests.modules.test_settled_layers import fresh as fresh  # a fixture of all tests here
from tests.truth.doors import DOORS, Call, truth_of

NAMES = ["ntk", "ggn product", "ggn diagonal", "fisher", "gradient norms", "projection"]
SIZES = pytest.mark.parametrize("size", [1, 5])
EACH = pytest.mark.parametrize("name", NAMES)


def assert_exact(name: str, call: Call, module: nn.Module, x: Tensor) -> None:
    expected = DOORS[name].expected(truth_of(module, (x,)), module)
    torch.testing.assert_close(call((x,)), expected, rtol=1e-10, atol=1e-10)


def settled(name: str, size: int) -> tuple[Any, Call]:
    """A module and a door, after so many calls that nothing is left to learn."""
    module = Network()
    call = DOORS[name].open(module)
    for _ in range(BEFORE["calls"]):
        call((points(size),))
    return module, call


@SIZES
@EACH
@pytest.mark.parametrize("kind", ["linear layers", "images", "recurrent", "attention", "tied"])
def test_each_call_is_exact(kind: str, name: str, size: int) -> None:
    make, draw = KINDS[kind]
    module = make().double()
    call = DOORS[name].open(module)
    step = torch.optim.SGD(module.parameters(), lr=0.1)
    for number in range(BEFORE["calls"] + 1):
        x = draw(3 if number == 4 else size)
        assert_exact(name, call, module, x)
        module(x).square().mean().backward()
        step.step()  # the next call finds other numbers
        step.zero_grad()


@SIZES
@EACH
@pytest.mark.parametrize("change", CHANGES)
def test_changes_count(change: str, name: str, size: int) -> None:
    module, call = settled(name, size)
    CHANGES[change](module)
    for _ in range(2):
        assert_exact(name, call, module, points(size))


@SIZES
@EACH
def test_hooks_on_parameters_count(name: str, size: int) -> None:
    module, call = settled(name, size)
    handle = module.first.weight.register_hook(lambda grad: 3 * grad)
    x = points(size)
    if name != "ggn product":  # which is refused: the hook is no part of what a tangent takes
        assert_exact(name, call, module, x)
    handle.remove()
    assert_exact(name, call, module, x)


@SIZES
@EACH
@pytest.mark.parametrize("how", ["twice", "without a rule", "as a view", "looks"])
def test_another_course_is_taken_anew(how: str, name: str, size: int) -> None:
    module, call = settled(name, size)
    for turn in (how, "", how, how, how, ""):
        HIDDEN["how"] = turn
        assert_exact(name, call, module, points(size))


@EACH
def test_samples_that_alone_go_another_way_are_seen(name: str) -> None:
    if name == "ggn product":  # is that of the batch as a whole
        return
    module = Network()
    HIDDEN["how"] = "goes apart"
    call = DOORS[name].open(module)
    ahead, apart = points(5).abs(), points(5)
    for x in (ahead,) * 5 + (apart, ahead, apart):
        assert_exact(name, call, module, x)


@SIZES
@pytest.mark.parametrize("name", ["ntk", "ggn diagonal", "gradient norms", "projection"])
def test_draws_are_refused(name: str, size: int) -> None:
    _, call = settled(name, size)
    HIDDEN["how"] = "draws"
    with pytest.raises(NotImplementedError, match="how samples draw random numbers"):
        call((points(size),))


@pytest.mark.parametrize("name", ["ntk", "ggn diagonal", "gradient norms", "projection"])
def test_samples_that_come_to_depend_are_refused(name: str) -> None:
    _, call = settled(name, 5)
    HIDDEN["how"] = "couples"
    for _ in range(calls_until_compared()):  # taken anew, by which each is differentiated alone
        call((points(5),))
    with pytest.raises(ValueError, match="samples that do not depend on each other"):
        call((points(5),))


@SIZES
@pytest.mark.parametrize("how", ["writes", "adds"])
@EACH
def test_writes_go_into_copies(name: str, how: str, size: int) -> None:
    module, call = settled(name, size)
    before, x = module.first.weight.detach().clone(), points(size)
    expected = DOORS[name].expected(truth_of(module, (x,)), module)
    HIDDEN["how"] = how
    call((x,))
    assert torch.equal(module.first.weight, before)
    HIDDEN["how"] = ""
    torch.testing.assert_close(call((x,)), expected, rtol=1e-10, atol=1e-10)


@SIZES
@pytest.mark.parametrize("name", ["ntk", "ggn diagonal", "gradient norms", "projection"])
def test_module_is_evaluated_and_swept_once(name: str, size: int) -> None:
    HIDDEN["how"] = "counts"
    _, call = settled(name, size)
    COUNT.update(evaluations=0, sweeps=0)
    call((points(size),))
    assert COUNT == {"evaluations": 1, "sweeps": 1}


def test_batches_are_compared_as_often_as_before() -> None:
    module, more_than_once = Network(), []
    for number in range(1, 20):
        COUNT["evaluations"] = 0
        jacfunc.ntk(module, None, points(4))
        if COUNT["evaluations"] > 1:
            more_than_once.append(number)
    assert more_than_once == [1, 2, 4, 8, 16]


def test_answers_are_those_of_the_point_of_the_call() -> None:
    module, _ = settled("ggn diagonal", 5)
    x = points(5)
    expected = DOORS["ggn diagonal"].expected(truth_of(module, (x,)), module)
    G = jacfunc.ggn(module, lambda out, _: 0.5 * out.square().sum())(x, None)
    with torch.no_grad():
        module.first.weight.zero_()
    x.zero_()
    flat = torch.cat([value.flatten() for value in G.diagonal().values()])
    torch.testing.assert_close(flat, expected, rtol=1e-10, atol=1e-10)


def test_errors_of_a_settled_kind_are_the_modules_own() -> None:
    _, call = settled("ntk", 5)
    HIDDEN["how"] = "raises"
    with pytest.raises(ArithmeticError, match="too large") as caught:
        call((points(5),))
    assert any("ntk: the module must run" in note for note in caught.value.__notes__)


@SIZES
def test_axes_and_selections_of_settled_kinds_count(size: int) -> None:
    module, call = settled("ntk", size)
    x = points(size)
    whole = DOORS["ntk"].expected(truth_of(module, (x,)), module).view(size, size, 2, 2)
    of_first = jacfunc.module_jacobian(module, select="first.*", per_sample=True, flat=True)(x)
    for _ in range(4):
        traced = jacfunc.ntk(module, None, x, trace_axes=0)
        torch.testing.assert_close(traced, whole.diagonal(dim1=2, dim2=3).sum(-1))
        diagonal = jacfunc.ntk(module, None, x, diagonal_axes=-1)
        torch.testing.assert_close(diagonal, whole.diagonal(dim1=2, dim2=3))
        some = jacfunc.ntk(module, "first.*", x)
        torch.testing.assert_close(some, torch.einsum("aip,bjp->abij", of_first, of_first))
        with pytest.raises(ValueError, match="must be axes of one sample's output, got 1"):
            jacfunc.ntk(module, None, x, trace_axes=1)
    assert_exact("ntk", call, module, x)


@SIZES
def test_errors_name_the_door_of_the_call(size: int) -> None:
    module, x = Network(), points(size)
    ggn = jacfunc.ggn(module, lambda out, _: 0.5 * out.square().sum(), select="last.*")
    for _ in range(5):
        ggn(x, None).diagonal()
    HIDDEN["how"] = "writes"
    with pytest.raises(RuntimeError, match="ntk: a parameter must be read alone"):
        jacfunc.ntk(module, "last.*", x)


def test_modules_are_freed() -> None:
    from gc import collect
    from weakref import ref

    module = Network()
    for _ in range(4):
        jacfunc.ntk(module, None, points(3))
    known = ref(module)
    del module
    collect()
    assert known() is None
