"""What people put tensors into: batches that come in objects, and outputs that go out in them."""

from __future__ import annotations

import dataclasses
from collections import ChainMap, OrderedDict, UserDict, UserList
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from jacfunc._trees import Split, flatten, paths, unflatten
from tests.truth.batches import DOORS, Call


@dataclasses.dataclass
class Batch:
    """A dataclass with a setting beside the tensor."""

    x: Any
    scale: Any = 2


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any


@dataclasses.dataclass(slots=True)
class Slots:
    x: Any
    unset: Any = dataclasses.field(init=False)


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots:
    x: Any


class Attrs:
    """As attrs makes classes: frozen, with slots, and with arguments of other names."""

    __attrs_attrs__ = (SimpleNamespace(name="_Attrs__x"),)
    __slots__ = ("__weakref__", "__x")

    def __init__(self, *, private: Any) -> None:
        object.__setattr__(self, "_Attrs__x", private)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("frozen")

    @property
    def x(self) -> Any:
        return self.__x


class Irreps(tuple):
    """A tuple as e3nn has it: of other arguments, of no length, and with an attribute."""

    def __new__(cls, items: Any, times: int = 1, *, name: str) -> Irreps:
        self = super().__new__(cls, tuple(items) * times)
        self.name = name
        return self

    def __len__(self) -> int:
        raise NotImplementedError("its dimension is meant")

    @property
    def x(self) -> Any:
        return self[0]


class Lookup(Mapping):
    """A mapping of its own, with a setting."""

    def __init__(self, x: Any) -> None:
        self._items, self.is_frozen = {"x": x}, True

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Items(list):
    """A list with an attribute, whose constructor takes the items one by one."""

    def __init__(self, *items: Any) -> None:
        super().__init__(items)
        self.x_first = True

    @property
    def x(self) -> Any:
        return self[0]


class OwnAttributes(dict):
    """A dict whose items are its attributes."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__ = self


class Layer:
    def __init__(self, keys: Tensor) -> None:
        self.keys, self.is_filled = keys, True


class Cache:
    """As caches of encoders are: a plain object of plain objects, with settings of all kinds."""

    def __init__(self, keys: Tensor) -> None:
        self.layers, self.kind, self.counts = [Layer(keys)], Layer, {0: True}

    @property
    def x(self) -> Any:
        return self.layers[0].keys


MAKES: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": Batch,
    "frozen": Frozen,
    "slots": Slots,
    "frozen slots": FrozenSlots,
    "attrs": lambda x: Attrs(private=x),
    "namespace": lambda x: SimpleNamespace(x=x, name="any"),
    "user dict": lambda x: UserDict(x=x),
    "user list": lambda x: UserList([x]),
    "ordered dict": lambda x: OrderedDict(x=x),
    "chained dicts": lambda x: ChainMap({}, {"x": x}),
    "mapping": Lookup,
    "own attributes": lambda x: OwnAttributes(x=x),
    "list": lambda x: Items(x),
    "tuple": lambda x: Irreps((x,), name="1x0e"),
    "object": Cache,
    "nested": lambda x: SimpleNamespace(x=Frozen(Irreps((x,), name="1x0e"))),
}
"""A container of each kind, from the tensor in it."""


def inside(container: Any) -> Any:
    """What is in the place of the tensor, in a container, or in containers of containers."""
    while not isinstance(container, Tensor):
        if isinstance(container, Mapping) and "x" in container:
            container = container["x"]
        elif isinstance(container, UserList):
            container = container[0]
        elif hasattr(container, "x"):
            container = container.x
        else:
            break
    return container


class Net(nn.Module):
    """A network that takes its batch out of a container, and puts its output into one."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.head, self.wrap = nn.Linear(3, 4), nn.Linear(4, 2), wrap
        self.irreps = Irreps((1, Irreps((2,), name="inner")), name="outer")

    def forward(self, batch: Any) -> Any:
        return self.wrap(self.head(torch.tanh(self.body(inside(batch)))))


def net(wrap: Callable[[Tensor], Any]) -> nn.Module:
    torch.manual_seed(0)
    return Net(wrap).double()


def floats() -> Tensor:
    return torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()


EVERY_CONTAINER = pytest.mark.parametrize("name", MAKES)
EVERY_DOOR = pytest.mark.parametrize("door", DOORS)


@EVERY_DOOR
@EVERY_CONTAINER
def test_batches_in_containers(name: str, door: str) -> None:
    if door in ("ntk", "operator") and isinstance(MAKES[name](floats()), tuple | list | UserList):
        return  # a tuple is taken for several arguments there, and a list for batches
    DOORS[door](Call(net(lambda x: x), floats(), MAKES[name]))


@EVERY_DOOR
@EVERY_CONTAINER
def test_outputs_in_containers(name: str, door: str) -> None:
    DOORS[door](Call(net(MAKES[name]), floats(), pick=inside))


@EVERY_CONTAINER
def test_functions_of_containers(name: str) -> None:
    x, make = floats()[0], MAKES[name]

    def func(container: Any) -> Any:
        return make(inside(container).sin())

    want = torch.diag(x.cos())
    for door in (jacfunc.jacrev, jacfunc.jacfwd, jacfunc.jacobian):
        got = door(func)(make(x))
        assert type(got) is type(make(x))
        torch.testing.assert_close(inside(got), want)
    value, pull = jacfunc.vjp(func, make(x))
    torch.testing.assert_close(inside(value), x.sin())
    torch.testing.assert_close(inside(pull(make(x))[0]), x.cos() * x)
    _, pushed = jacfunc.jvp(func, (make(x),), (make(x),))
    torch.testing.assert_close(inside(pushed), x.cos() * x)
    scalar = jacfunc.hessian(lambda container: inside(func(container)).sum())(make(x))
    torch.testing.assert_close(inside(scalar), torch.diag(-x.sin()))


@EVERY_CONTAINER
def test_auxiliary_objects(name: str) -> None:
    x, make = floats()[0], MAKES[name]
    for door in (jacfunc.jacrev, jacfunc.jacfwd, jacfunc.jacobian):
        got, aux = door(lambda x: (x.sin(), make(2 * x)), has_aux=True)(x)
        torch.testing.assert_close(got, torch.diag(x.cos()))
        assert type(aux) is type(make(x))
        assert torch.equal(inside(aux), 2 * x)
        assert type(inside(aux)) is Tensor
        assert not inside(aux).requires_grad
    _, _, aux = jacfunc.vjp(lambda x: (x.sin(), make(2 * x)), x, has_aux=True)
    assert torch.equal(inside(aux), 2 * x)


def test_auxiliary_objects_of_any_kind() -> None:
    x, model = floats()[0], nn.Linear(1, 1)
    things = (object(), model, lambda: x, "words", torch.float32, range(2), Layer)
    for door in (jacfunc.jacrev, jacfunc.jacfwd, jacfunc.jacobian):
        _, aux = door(lambda x: (x.sin(), things), has_aux=True)(x)
        assert all(one is other for one, other in zip(aux, things, strict=True))


@EVERY_CONTAINER
def test_containers_are_put_together_as_they_were(name: str) -> None:
    thing = MAKES[name](floats())
    leaves, spec = flatten(thing)
    again = unflatten(spec, leaves)
    assert type(again) is type(thing)
    assert again is not thing
    assert inside(again) is inside(thing)
    assert flatten(again)[1] == spec
    assert hash(flatten(again)[1]) == hash(spec)


def test_attributes_are_kept() -> None:
    irreps, items, own = Irreps((floats(),), name="1x0e"), Items(floats()), MAKES["own attributes"]
    again = unflatten(*reversed(flatten(irreps)))
    assert again.name == "1x0e"
    assert unflatten(*reversed(flatten(items))).x_first
    again = unflatten(*reversed(flatten(own(floats()))))
    again["y"] = 3
    assert again.y == 3


def test_constants_have_none_in_their_place() -> None:
    jac = jacfunc.jacrev(lambda batch: Batch(batch.x * batch.scale, "words"))(Batch(floats()[0], 3))
    torch.testing.assert_close(jac.x.x, 3 * torch.eye(3).double())
    assert jac.scale is None
    assert jac.x.scale is None


def test_paths_of_objects_read_like_code() -> None:
    tree = {"a": UserDict(x=floats()), "b": Cache(floats()), "c": Irreps((floats(),), name="c")}
    assert [p for p in paths(tree, "batch") if "counts" not in p] == [
        "batch['a']['x']",
        "batch['b'].layers[0].keys",
        "batch['b'].layers[0].is_filled",
        "batch['b'].kind",
        "batch['c'][0]",
        "batch['c'].name",
    ]


def test_inputs_inside_objects_are_named_by_path() -> None:
    batch = SimpleNamespace(x=UserDict(x=floats(), y=floats()))
    module = nn.Linear(3, 2).double()
    module.forward = lambda batch: nn.functional.linear(batch.x["x"] * batch.x["y"], module.weight)
    jac = jacfunc.module_jacobian(module, "inputs", inputs="batch.x['y']", per_sample=True)(batch)
    want = torch.einsum("oi,bi->boi", module.weight.detach(), floats())
    torch.testing.assert_close(jac.x["y"], want)
    assert jac.x["x"] is None


def test_in_dims_of_objects() -> None:
    module = net(lambda x: x)
    both = jacfunc.module_jacobian(module, per_sample=True, in_dims=(Batch(1, None),))
    module.body.register_forward_pre_hook(lambda body, args: (args[0].mT,))
    got = both(Batch(floats().mT.contiguous(), 1))
    module.body._forward_pre_hooks.clear()
    Call(module, floats()).same(got, Call(module, floats()).each)


class Holder:
    """An object that must stay itself: what is called with it writes into it."""

    def __init__(self) -> None:
        self.names: list[str] = []


def test_objects_without_tensors_stay_themselves() -> None:
    for thing in (Holder(), nn.Linear(1, 1), lambda: 1, Batch, range(2)):
        assert flatten([thing])[0] == [thing]


def test_objects_that_lead_to_themselves_are_leaves() -> None:
    for thing in (SimpleNamespace(x=floats()), Holder()):
        thing.self = [thing, floats()]
        assert flatten([thing])[0] == [thing]


def test_what_is_called_or_is_a_tensor_to_torch_is_a_leaf() -> None:
    class Called(Layer):
        def __call__(self) -> Tensor:
            return self.keys

    class Like(Layer):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
            return NotImplemented

    for thing in (Called(floats()), Like(floats()), nn.Linear(1, 1)):
        assert flatten([thing])[0] == [thing]
        assert Split.of([thing]).leaves == ()


class Counting(nn.Module):
    """A module that keeps an object twice, and writes into the one that lies in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.state = nn.Linear(3, 2), Layer(torch.zeros(()))
        self.states = [self.state]

    def forward(self, batch: Any) -> Tensor:
        self.states[0].keys = self.states[0].keys + 1
        return self.layer(batch.keys) * self.state.keys


def test_objects_of_a_module_stay_the_same_object() -> None:
    """Although their class is taken apart where a batch comes in it."""
    module = Counting().double()
    jac = jacfunc.module_jacobian(module, per_sample=True)(Layer(floats()))
    torch.testing.assert_close(jac["layer.bias"], torch.eye(2).double().expand(3, 2, 2))
    assert module.state.keys == 0
    assert module.states[0] is module.state


def test_an_output_that_a_function_must_not_return_is_named() -> None:
    with pytest.raises(
        TypeError, match=r"^jacrev: func must return tensors, got str at output\[1]"
    ):
        jacfunc.jacrev(lambda x: [Batch(x), "words"])(floats())


class Scaled(nn.Module):
    """A layer, and what all samples share, from a batch that is a dict of any kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, batch: Any) -> Any:
        return UserDict(logits=self.layer(batch["x"]) * batch["shared"]["scale"].sum())


KINDS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "user dict": UserDict,
    "encoding": lambda items: Encoding(items, kind="pt"),
}


class Encoding(UserDict):
    """As ``BatchEncoding`` is: a setting beside the items."""

    def __init__(self, items: Any, *, kind: str) -> None:
        super().__init__(items)
        self.kind = kind


@pytest.mark.parametrize("inner", KINDS)
@pytest.mark.parametrize("outer", KINDS)
def test_in_dims_of_dicts_fit_any_kind_of_dict(outer: str, inner: str) -> None:
    torch.manual_seed(0)
    module, x, scale = Scaled().double(), floats(), torch.rand(7).double()
    batch = KINDS[outer]({"x": x, "shared": KINDS[inner]({"scale": scale})})
    want = torch.einsum("om,bi->bomi", torch.eye(2).double(), x) * scale.sum()
    for shared in (None, {"scale": None}):
        jac = jacfunc.module_jacobian(
            module, per_sample=True, in_dims=({"x": 0, "shared": shared},)
        )
        torch.testing.assert_close(jac(batch)["logits"]["layer.weight"], want)
    with pytest.raises(ValueError, match=r"in_dims must have the structure .* of 'x', 'shared'"):
        jacfunc.module_jacobian(module, per_sample=True, in_dims=({"x": 0},))(batch)


def test_targets_and_vectors_in_user_dicts() -> None:
    torch.manual_seed(0)
    module, x, y = Scaled().double(), floats(), torch.tensor([0, 1, 1])
    batch = UserDict(x=x, shared={"scale": torch.ones(1).double()})
    shared: Any = {"in_dims": ({"x": 0, "shared": None},)}

    def loss(outputs: Any, targets: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs["logits"], targets["y"])

    ones = {name: torch.ones_like(p) for name, p in module.named_parameters()}
    plain = jacfunc.ggn(module.layer, nn.functional.cross_entropy)(x, y)
    G = jacfunc.ggn(module, loss, **shared)(batch, UserDict(y=y))
    torch.testing.assert_close(G.matrix(), plain.matrix())
    got = G @ UserDict(ones)
    want = plain @ {name.removeprefix("layer."): x for name, x in ones.items()}
    torch.testing.assert_close(list(got.values()), list(want.values()))
    norms = jacfunc.gradient_norms(module, loss, **shared)(batch, UserDict(y=y))
    gradients = [
        torch.autograd.grad(loss(module({**batch, "x": x[n : n + 1]}), {"y": y[n : n + 1]}) / 3, p)
        for n in range(3)
        for p in [list(module.parameters())]
    ]
    each = [torch.cat([g.flatten() for g in row]).norm() for row in gradients]
    torch.testing.assert_close(norms, torch.stack(each))
    batches = [UserDict(batch, x=part) for part in (x[:1], x[1:])]
    kernel = jacfunc.ntk(module, None, batches, **shared)["logits"]
    torch.testing.assert_close(kernel, jacfunc.ntk(module.layer, None, x))
