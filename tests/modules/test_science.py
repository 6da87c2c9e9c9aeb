"""Stand-ins for the modules of scientific libraries × every door, against samples taken alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from tests.kinds.modules import floats
from tests.kinds.science_modules import COUPLED, SCIENCE_MODULES, B
from tests.truth.doors import DOORS, Call, Inputs, Truth, alone, truth_of

KINDS = {kind.name: kind for kind in SCIENCE_MODULES}
COUPLES = {kind.name: kind for kind in COUPLED}
MIXED = "samples that do not depend on each other"
PER_SAMPLE = [name for name in DOORS if name not in ("ggn product", "operator")]
"""Doors that take each sample alone: products take the batch as it is."""


@cache
def truth(name: str, seed: int) -> Truth:
    kind = KINDS.get(name) or COUPLES[name]
    return truth_of(kind.make(), kind.inputs(seed))


def assert_true(door: str, got: Tensor, true: Truth, module: nn.Module) -> None:
    expected = DOORS[door].expected(true, module)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", KINDS)
def test_every_door_is_right(name: str, door: str) -> None:
    """At every call with other samples, where the path through the module may be another one."""
    kind = KINDS[name]
    module = kind.make()
    call = DOORS[door].open(module)
    for seed in range(1, 6 if kind.looks else 3):
        assert_true(door, call(kind.inputs(seed)), truth(name, seed), module)


@pytest.mark.parametrize("door", ["both, auto", "ntk", "stream by samples"])
@pytest.mark.parametrize("name", KINDS)
def test_batches_of_other_sizes(name: str, door: str) -> None:
    """Sites that were learned of one batch are not those of another."""
    kind = KINDS[name]
    module = kind.make()
    call = DOORS[door].open(module)
    for size in (7, 1, 2, 3):
        pairs = zip(kind.inputs(size), kind.inputs(size + 1), strict=True)
        inputs = tuple(torch.cat(pair)[:size] for pair in pairs)
        assert_true(door, call(inputs), truth_of(module, inputs), module)


def answer(call: Call, inputs: Inputs) -> Tensor | str:
    """What a door returns, or what it says where it refuses: its name, and what to do instead."""
    try:
        return call(inputs)
    except (NotImplementedError, ValueError) as error:
        message = str(error)
    api, _, rest = message.partition(": ")
    assert api.isidentifier()
    assert ". Use " in rest
    return message


def never_wrong(door: str, call: Call, module: nn.Module, inputs: Inputs) -> None:
    """Right for each sample alone, or refused."""
    got = answer(call, inputs)
    if isinstance(got, Tensor):
        assert_true(door, got, truth_of(module, inputs), module)


# --- samples that depend on each other ---


@pytest.mark.parametrize("door", PER_SAMPLE)
@pytest.mark.parametrize("name", [name for name, kind in COUPLES.items() if not kind.looks])
def test_samples_that_depend_on_each_other_are_refused(name: str, door: str) -> None:
    kind = COUPLES[name]
    call = DOORS[door].open(kind.make())
    for seed in (1, 2):
        with pytest.raises(ValueError, match=MIXED):
            call(kind.inputs(seed))


SEEN = {"an order made by Python"}
"""Kinds that call other operations each time, by which products see that samples are coupled."""


@pytest.mark.parametrize("name", sorted(SEEN))
def test_products_see_what_couples_by_other_operations(name: str) -> None:
    kind = COUPLES[name]
    call = DOORS["ggn product"].open(kind.make())
    calls = (call(kind.inputs(seed)) for seed in range(1, 6))
    with pytest.raises(ValueError, match=MIXED):
        list(calls)


@pytest.mark.parametrize("name", [n for n in COUPLES if n not in {"U-net in train mode", *SEEN}])
def test_products_are_those_of_the_batch(name: str) -> None:
    kind = COUPLES[name]
    module = kind.make()
    call = DOORS["ggn product"].open(module)
    for seed in range(1, 6):
        rows = alone(module, kind.inputs(seed)).params
        expected = torch.einsum("mp,mq->p", rows, rows)
        torch.testing.assert_close(call(kind.inputs(seed)), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("door", PER_SAMPLE)
@pytest.mark.parametrize("name", [name for name, kind in COUPLES.items() if kind.looks])
def test_what_couples_for_some_numbers_only(name: str, door: str) -> None:
    """Right or refused, also where the first call does not show it."""
    kind = COUPLES[name]
    module = kind.make()
    call = DOORS[door].open(module)
    for seed in range(1, 6):
        never_wrong(door, call, module, kind.inputs(seed))


# --- samples that change places ---


class InPlaces(nn.Module):
    """A layer that gets two samples in each other's place."""

    def __init__(self, order: list[int], by_index: bool) -> None:
        super().__init__()
        self.layer, self.order, self.by_index = nn.Linear(3, 2), order, by_index

    def placed(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            return x
        return x[self.order] if self.by_index else torch.stack([x[n] for n in self.order])

    def forward(self, x: Tensor) -> Tensor:
        return self.placed(self.layer(self.placed(x)).tanh()).sin()


@pytest.mark.parametrize("by_index", [True, False])
@pytest.mark.parametrize("pair", list(combinations(range(5), 2)))
def test_samples_that_change_places(pair: tuple[int, int], by_index: bool) -> None:
    order = list(range(5))
    i, j = pair
    order[i], order[j] = j, i
    torch.manual_seed(0)
    module, inputs = InPlaces(order, by_index).double(), (floats(5, 3),)
    true = truth_of(module, inputs)
    for door in ("params, auto", "ntk", "gradient norms", "stream by params"):
        assert_true(door, DOORS[door].open(module)(inputs), true, module)


# --- what nobody sees ---

SHIFT, GATE, SETTINGS = 0, [0.0], {"sorted": False}


class Switched(nn.Module):
    """Mixes samples as module globals say."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x).tanh().roll(SHIFT, 0)
        if GATE[0]:
            h = h - GATE[0] * h.mean(0)
        if SETTINGS["sorted"]:
            h = h.sort(0)[0]
        return self.leave(h)


def shift() -> None:
    global SHIFT
    SHIFT = 1


def open_gate() -> None:
    GATE[0] = 0.5


def sort() -> None:
    SETTINGS["sorted"] = True


@pytest.fixture
def switched_off() -> Iterator[None]:
    global SHIFT
    yield
    SHIFT, GATE[0], SETTINGS["sorted"] = 0, 0.0, False


@pytest.mark.parametrize(
    ("switch", "calls"), [(shift, 1), (shift, 2), (shift, 4), (open_gate, 2), (sort, 2)]
)
@pytest.mark.parametrize("door", PER_SAMPLE)
@pytest.mark.usefixtures("switched_off")
def test_a_global_that_begins_to_mix_samples(
    door: str, switch: Callable[[], None], calls: int
) -> None:
    torch.manual_seed(0)
    module = Switched().double()
    call = DOORS[door].open(module)
    for seed in range(calls):
        answer(call, (floats(B, 3, seed=seed),))
    switch()
    for seed in range(calls, calls + 2):
        never_wrong(door, call, module, (floats(B, 3, seed=seed),))
