"""Modules and losses whose samples depend on each other are refused; all others are not."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

import jacfunc
from jacfunc._linear_map import Samples
from jacfunc._memory import PeakBytes
from jacfunc._samples import Subject, coupling
from jacfunc._types import Leaves
from tests.kinds.losses import half_square

MIXED = "samples that do not depend on each other"
B = 6


class Mixing(nn.Module):
    """A layer, and what becomes of its outputs."""

    def __init__(self, mix: Callable[..., Tensor], width: int = 4, **params: Tensor) -> None:
        super().__init__()
        self.layer, self.mix = nn.Linear(3, width), mix
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self, self.layer(x))


def batch(size: int = B, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, dtype=torch.float64, generator=generator)


def one_pair(module: Any, h: Tensor) -> Tensor:
    """The second sample gets a little of the fifth."""
    return torch.cat([h[:1], h[1:2] + 1e-6 * h[4:5], h[2:]])


class Deciding(nn.Module):
    """Goes one way or the other by a look at the numbers of all samples."""

    def __init__(self, is_small: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.layer, self.is_small = nn.Linear(3, 2).double(), is_small

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.is_small(x.detach().abs() < 9) else self.layer(2 * x)


LOOKS: dict[str, Callable[[Tensor], bool]] = {
    "bool": lambda is_small: bool(is_small.all()),
    "equal": lambda is_small: torch.equal(is_small, torch.ones_like(is_small)),
    "method": lambda is_small: is_small.equal(torch.ones_like(is_small)),
    "allclose": lambda is_small: torch.allclose(is_small.float(), torch.ones(())),
    "is_nonzero": lambda is_small: torch.is_nonzero(is_small.all()),
    "in": lambda is_small: False not in is_small,
    "format": lambda is_small: f"{is_small.all()}" == "True",
    "complex": lambda is_small: complex(is_small.all()) == 1,
    "NumPy": lambda is_small: bool(is_small.numpy().all()),
    "an array": lambda is_small: bool(np.asarray(is_small).all()),
}


@pytest.mark.parametrize("calls", [5, 20])
@pytest.mark.parametrize("look", LOOKS)
def test_each_look_at_numbers_is_compared_with_samples_alone(look: str, calls: int) -> None:
    module = Deciding(LOOKS[look])
    jac = jacfunc.module_jacobian(module, "inputs", per_sample=True)
    for number in range(calls):  # all samples go the same way, one or the other
        jac(batch(seed=number) + 10 * (number % 2))
    x = batch()
    x[2, 1] = 10.0  # at a call in which no batches would be compared otherwise
    weight = module.layer.weight.detach()
    own = torch.stack([weight * (2 if number == 2 else 1) for number in range(B)])
    try:
        result = jac(x)
    except ValueError as error:
        result, words = own, str(error)
        assert MIXED in words
    torch.testing.assert_close(result, own)


def worst_steps(module: Any, h: Tensor) -> Tensor:
    """Takes as many steps as the worst sample of the batch needs."""
    count = int(h.detach().abs().max() * 20)
    for _ in range(count):
        h = h + torch.sin(h) / count
    return h


def attention_over_the_batch(module: Any, h: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(h[None], h[None], h[None])[0]


def centred_by_a_gate(module: Any, h: Tensor) -> Tensor:
    return h + module.gate * h.mean(0)


MIXES: dict[str, tuple[Callable[..., Tensor], dict[str, Tensor]]] = {
    "roll": (lambda m, h: h + 1e-9 * h.roll(1, 0), {}),
    "mean": (lambda m, h: h - h.mean(0), {}),
    "gate that is zero": (centred_by_a_gate, {"gate": torch.zeros(())}),
    "detached deviation": (lambda m, h: h / h.detach().std(0), {}),
    "deviation, nan of one": (lambda m, h: (h - h.mean(0)) / h.std(0), {}),
    "sorted": (lambda m, h: h.sort(0)[0], {}),
    "argmax": (lambda m, h: h * (torch.arange(len(h)) == h[:, 0].argmax())[:, None], {}),
    "cumulated": (lambda m, h: h.cumsum(0), {}),
    "one pair": (one_pair, {}),
    "steps by the worst": (worst_steps, {}),
    "attention": (attention_over_the_batch, {}),
    "all pairs": (lambda m, h: h @ h.T, {}),
    "weights of the batch": (lambda m, h: h * (h @ m.w).softmax(0)[:, None], {"w": torch.ones(4)}),
    "small beside large": (
        lambda m, h: torch.stack([1e9 * (h[:, 0] + 3), h[:, 1] - h[:, 1].mean()], 1),
        {},
    ),
    "behind nan": (lambda m, h: torch.cat([h.detach() * torch.nan, h - h.mean(0)], 1), {}),
    "by the size": (lambda m, h: h * len(h), {}),
    "no batch in front": (lambda m, h: h.mean(0, keepdim=True), {}),
    "two samples in one row": (lambda m, h: h[1:2] * h[4:5], {}),
    "gate behind the first": (lambda m, h: h[:1] + m.gate * h[-1:], {"gate": torch.zeros(())}),
    "a row of pairs": (lambda m, h: (h @ h.T).view(1, -1), {}),
}


def mixing(name: str) -> nn.Module:
    mix, params = MIXES[name]
    return Mixing(mix, **params).double()


Door = Callable[..., Any]
TARGETS = torch.zeros(())


def per_sample(wrt: Any, **ways: Any) -> Door:
    return lambda m, x, **more: jacfunc.module_jacobian(m, wrt, per_sample=True, **ways, **more)(x)


def streamed(by: Any) -> Door:
    return lambda m, x, **more: list(
        jacfunc.stream_jacobian(m, by, per_sample=True, chunk_size=4, **more)(x)
    )


DOORS: dict[str, Door] = {
    "params": per_sample("params"),
    "inputs": per_sample("inputs"),
    "both": per_sample(("params", "inputs")),
    "looped": per_sample("params", strategy="looped"),
    "stream by params": streamed("params"),
    "stream by rows": streamed("rows"),
    "stream by samples": streamed("samples"),
    "ntk": lambda m, x, **more: jacfunc.ntk(m, None, x, **more),
    "ggn diagonal": lambda m, x, **more: jacfunc.ggn(m, half_square, **more)(x, TARGETS).diagonal(),
    "ggn blocks": lambda m, x, **more: jacfunc.ggn(m, half_square, **more)(x, TARGETS).blocks(),
    "ggn matrix": lambda m, x, **more: jacfunc.ggn(m, half_square, **more)(x, TARGETS).matrix(),
    "fisher": lambda m, x, **more: jacfunc.fisher(m, "gaussian", **more)(x).diagonal(),
    "gradient norms": lambda m, x, **more: jacfunc.gradient_norms(m, half_square, **more)(
        x, TARGETS
    ),
    "projection": lambda m, x, **more: jacfunc.random_projection(m, 4, **more)(x),
    "projection of gradients": lambda m, x, **more: jacfunc.random_projection(
        m, 4, half_square, **more
    )(x, TARGETS),
}
CHEAP = ["params", "inputs", "stream by rows", "ntk", "ggn diagonal", "gradient norms"]
TYPICAL = ["mean", "gate that is zero", "detached deviation", "all pairs", "behind nan"]
EVERY_DOOR = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


@pytest.mark.parametrize(
    ("name", "door"),
    [(name, door) for name in MIXES for door in DOORS if door in CHEAP or name in TYPICAL],
)
def test_what_mixes_samples_is_refused(name: str, door: str) -> None:
    with pytest.raises(ValueError, match=MIXED):
        DOORS[door](mixing(name), batch())


@pytest.mark.parametrize("size", [2, 3, 5, 17, 40])
@pytest.mark.parametrize("name", ["mean", "gate that is zero", "detached deviation", "sorted"])
def test_batches_of_every_size(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=MIXED):
        DOORS["params"](mixing(name), batch(size))


@pytest.mark.parametrize("pair", [(i, j) for i in range(5) for j in range(5) if i != j])
def test_each_pair_of_samples_is_parted(pair: tuple[int, int]) -> None:
    to, source = pair

    def mix(module: Any, h: Tensor) -> Tensor:
        return h + F.one_hot(torch.tensor(to), len(h))[:, None] * h[source].tanh()

    with pytest.raises(ValueError, match=MIXED):
        DOORS["params"](Mixing(mix).double(), batch(5))


def test_what_is_frozen_or_not_chosen_couples_too() -> None:
    model = mixing("gate that is zero")
    with pytest.raises(ValueError, match="derivatives in parameters"):
        jacfunc.module_jacobian(model, select="layer.*", per_sample=True)(batch())
    model.gate.requires_grad_(False).fill_(0.5)
    with pytest.raises(ValueError, match=MIXED):
        jacfunc.module_jacobian(model, per_sample=True)(batch())


def test_equal_samples_show_it_by_their_derivatives() -> None:
    with pytest.raises(ValueError, match="derivatives in inputs"):
        DOORS["inputs"](mixing("mean"), batch(1).expand(4, 3))


@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("door", ["params", "inputs", "looped", "stream by params"])
def test_modules_for_one_sample_take_each_alone(door: str, number: int, size: int) -> None:
    """Modules that return one row for a batch: that of one of its samples."""
    model, x = Mixing(lambda m, h: h[number].sin()[None]).double(), batch(size)
    rowwise = Mixing(lambda m, h: h.sin()).double()
    rowwise.load_state_dict(model.state_dict())
    result, expected = (DOORS[door](m, x, independent="always") for m in (model, rowwise))
    for mine, its in zip(tree_leaves(result), tree_leaves(expected), strict=True):
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine, its, rtol=0, atol=1e-14)


def test_modules_that_take_a_batch_for_a_sequence_take_each_alone() -> None:
    """A sample has fewer dimensions than what they are made of."""
    gru = nn.GRU(4, 3).double()
    model = Mixing(lambda m, h: gru(h.squeeze(0))[0].unsqueeze(0)).double()
    x = torch.randn(3, 5, 3).double()
    result = jacfunc.module_jacobian(model, "inputs", per_sample=True)(x)
    for block, one in zip(result, x, strict=True):
        expected = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], one)
        torch.testing.assert_close(block, expected, rtol=0, atol=1e-14)


# --- looked at again ---


def centre(module: nn.Module, given: Any, out: Tensor) -> Tensor:
    return out - out.mean(0)


class Switched(nn.Module):
    """Centres the batch or not, as it is told; modules of one width are equal."""

    def __init__(self, is_on: bool = False) -> None:
        super().__init__()
        self.layer, self.is_on, self.settings = nn.Linear(3, 2), is_on, {"is_on": False}

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return h - h.mean(0) if self.is_on or self.settings["is_on"] else h

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Switched)


def hook_it(model: Any) -> None:
    model.layer.register_forward_hook(centre)


def switch(model: Any) -> None:
    model.is_on = True


def set_in_place(model: Any) -> None:
    model.settings["is_on"] = True


def other_part(model: Any) -> None:
    model.layer = nn.Sequential(model.layer, Mixing(MIXES["mean"][0], 2).double().eval())
    model.layer[1].layer = nn.Identity()


def other_forward(model: Any) -> None:
    model.forward = lambda x: centre(model, None, model.layer(x))


CHANGES = [hook_it, switch, set_in_place, other_part, other_forward]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CHEAP)
def test_a_module_that_couples_later(name: str, change: Callable[[Any], None]) -> None:
    model, x = Switched().double(), batch()
    DOORS[name](model, x)
    change(model)
    with pytest.raises(ValueError, match=MIXED):
        DOORS[name](model, x)


@pytest.mark.parametrize("change", [hook_it, switch, other_part, other_forward])
@pytest.mark.parametrize("calls", [1, 3, 6])
def test_a_door_that_was_made_before(calls: int, change: Callable[[Any], None]) -> None:
    model, x = Switched().double(), batch()
    doors = [jacfunc.module_jacobian(model, per_sample=True)]
    norms = jacfunc.gradient_norms(model, half_square)
    for _ in range(calls):
        doors[0](x)
        norms(x, TARGETS)
    change(model)
    with pytest.raises(ValueError, match=MIXED):
        doors[0](x)
    with pytest.raises(ValueError, match=MIXED):
        norms(x, TARGETS)


def test_a_hook_of_all_modules() -> None:
    model, x = nn.Linear(3, 2).double(), batch()
    DOORS["params"](model, x)
    handle = register_module_forward_hook(centre)
    try:
        with pytest.raises(ValueError, match=MIXED):
            DOORS["params"](model, x)
    finally:
        handle.remove()
    DOORS["params"](model, x)


def test_modules_that_are_equal_are_looked_at_one_by_one() -> None:
    x = batch()
    DOORS["params"](Switched().double(), x)
    with pytest.raises(ValueError, match=MIXED):
        DOORS["params"](Switched(True).double(), x)


def test_another_kind_of_call_is_looked_at() -> None:
    model = Mixing(lambda m, h: h - h.mean(0) if len(h) == 4 else h).double()
    DOORS["params"](model, batch())
    with pytest.raises(ValueError, match=MIXED):
        DOORS["params"](model, batch(4))


def test_what_nobody_sees_is_met_sooner_or_later() -> None:
    """A flag outside the module: looked at again at the second, fourth, eighth call."""
    flags: list[int] = []
    model = Mixing(lambda m, h: h - h.mean(0) if flags else h).double()
    door, x = jacfunc.module_jacobian(model, per_sample=True), batch()
    for _ in range(5):
        door(x)
    flags.append(1)
    door(x), door(x)
    with pytest.raises(ValueError, match=MIXED):
        door(x)


SWITCH = torch.zeros((), dtype=torch.float64)
SWITCHED_BY: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a buffer": lambda m, h: h - m.switch * h.mean(0),
    "a tensor outside": lambda m, h: h - SWITCH * h.mean(0),
    "the data": lambda m, h: h - (m.seen.abs().amax() > 5).to(h) * h.mean(0),
    "the data, sample by sample": lambda m, h: h + (h.abs() > 9) * h.flip(0),
    "the data, in place": lambda m, h: h.clone().sub_((m.seen.abs().amax() > 5) * h.mean(0)),
    "the data, by the first sample": lambda m, h: h + (m.seen[0, 0] > 5) * h[-1],
}


class SwitchedByNumbers(Mixing):
    """What it does to a batch changes with numbers alone: the operations stay the same."""

    def __init__(self, mix: Callable[..., Tensor]) -> None:
        super().__init__(mix)
        self.register_buffer("switch", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach()
        return super().forward(x)


@pytest.mark.parametrize("name", SWITCHED_BY)
@pytest.mark.parametrize("door_name", ["layers", *CHEAP[1:]])
def test_numbers_that_couple_samples_later(name: str, door_name: str) -> None:
    """At the third call nothing is compared but where operations may mix the samples."""
    model, x = SwitchedByNumbers(SWITCHED_BY[name]).double(), batch()
    door = DOORS.get(door_name) or per_sample("params", strategy="structured")
    door(model, x)
    door(model, x)
    if name.startswith("the data"):
        x = x.clone()
        x[0] = 400.0
    model.switch.fill_(1)
    SWITCH.fill_(1)
    try:
        with pytest.raises(ValueError, match=MIXED):
            door(model, x)
    finally:
        SWITCH.fill_(0)


def test_at_every_call_where_outputs_are_many() -> None:
    flags: list[int] = []
    model = nn.Sequential(nn.Linear(3, 200), Mixing(lambda m, h: h - h.mean(0) if flags else h))
    model[1].layer = nn.Identity()
    door = jacfunc.module_jacobian(model, per_sample=True)
    x = batch(128).float()
    for _ in range(4):
        door(x)
    flags.append(1)
    with pytest.raises(ValueError, match=MIXED):
        door(x)


def test_a_module_is_not_kept_alive() -> None:
    model = Switched().double()
    DOORS["params"](model, batch())
    DOORS["gradient norms"](model, batch())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --- the word ---


@EVERY_DOOR
def test_a_word_skips_it(door: Door) -> None:
    door(mixing("roll"), batch(), independent=True)


@EVERY_DOOR
def test_a_word_insists(door: Door) -> None:
    flags: list[int] = []
    model, x = Mixing(lambda m, h: h + h.roll(1, 0) if flags else h).double(), batch()
    for _ in range(4):
        door(model, x, independent="always")
    flags.append(1)
    with pytest.raises(ValueError, match=MIXED):
        door(model, x, independent="always")


@EVERY_DOOR
@pytest.mark.parametrize("word", [False, "never", 1])
def test_other_words_are_refused(door: Door, word: Any) -> None:
    with pytest.raises(ValueError, match="independent must be None, True or 'always', got"):
        door(nn.Linear(3, 2), batch(), independent=word)


# --- what must pass ---


class First(nn.Module):
    """The first of what a module returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Any, **named: Any) -> Tensor:
        out: Tensor = self.inner(*given, **named)[0]
        return out


class Experts(nn.Module):
    """Each sample goes to one expert: how many each gets differs from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(300, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            chosen = (x[:, 0] > 0) == bool(number)
            out[chosen] = expert(x[chosen])
        return out


class GroupedExperts(nn.Module):
    """Each token goes to one expert, all by one product: how many go to each is a tensor."""

    def __init__(self, width: int = 16, is_coupled: bool = False) -> None:
        super().__init__()
        self.router, self.is_coupled = nn.Linear(width, 4), is_coupled
        self.weights = nn.Parameter(torch.randn(4, width, width) / 3)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.router(x).softmax(-1).max(-1)
        order = chosen.flatten().argsort()
        ends = chosen.flatten().bincount(minlength=4).cumsum(0).int()
        rows = F.grouped_mm(x.flatten(0, 1)[order], self.weights, offs=ends)
        rows = torch.zeros_like(rows).index_copy(0, order, rows).view_as(x)
        out = (rows * scores.unsqueeze(-1)).sum(1)
        return out - 1e-3 * out.mean(0) if self.is_coupled else out


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten())


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.LazyLinear(3)),
    )


def ids(*shape: int) -> Tensor:
    return torch.randint(10, shape)


class Root(nn.Linear):
    """The derivative of the first sample is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sub(super().forward(x[:, :0].new_zeros(3))).abs().sqrt()


SOUND: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "linear": (lambda: nn.Linear(3, 2), lambda size: torch.randn(size, 3)),
    "LSTM": (lambda: First(nn.LSTM(3, 4, batch_first=True)), lambda size: torch.randn(size, 5, 3)),
    "GRU": (lambda: First(nn.GRU(3, 4, batch_first=True)), lambda size: torch.randn(size, 5, 3)),
    "encoder": (encoder, lambda size: torch.randn(size, 4, 8)),
    "convolutions": (convolutional, lambda size: torch.randn(size, 2, 6, 6)),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2)),
        lambda size: ids(size, 3),
    ),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 2)), lambda s: ids(s, 3)),
    "experts": (Experts, lambda size: torch.randn(size, 300)),
    "nan of a sample": (
        lambda: nn.Linear(3, 2),
        lambda size: torch.randn(size, 3).index_fill_(0, torch.tensor([0]), torch.nan),
    ),
    "infinite derivative": (
        lambda: Root(3, 2),
        lambda size: torch.randn(size, 3).index_fill_(0, torch.tensor([0]), 0.0),
    ),
}


@pytest.mark.parametrize("size", [1, 2, 3, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SOUND)
def test_independent_samples_pass(name: str, dtype: torch.dtype, size: int) -> None:
    make, inputs = SOUND[name]
    x = inputs(size)
    x = x.to(dtype) if x.is_floating_point() else x
    model = make().eval()
    model(x.float() if x.is_floating_point() else x)
    model = model.to(dtype)
    ways: dict[str, Any] = {"experts": {"strategy": "looped"}}.get(name, {})
    door = jacfunc.module_jacobian(model, per_sample=True, independent="always", **ways)
    for _ in range(3):
        door(x)


def test_groups_of_other_sizes_are_rounded_otherwise() -> None:
    model, x = GroupedExperts(), torch.randn(6, 3, 16)  # torch has no such product in float64
    apart = [(model(x)[b] - model(x[b : b + 1])[0]).abs().max() for b in range(6)]
    assert 0 < max(apart) < 1e-6
    params = dict(model.named_parameters())
    jac = jacfunc.module_jacobian(model, per_sample=True)(x)
    for b in range(6):
        for number, out in enumerate(model(x[b : b + 1])[0]):
            rows = torch.autograd.grad(out, list(params.values()), retain_graph=True)
            for name, row in zip(params, rows, strict=True):
                torch.testing.assert_close(jac[name][b, number], row, rtol=1e-4, atol=1e-5)
    coupled = GroupedExperts(is_coupled=True)
    with pytest.raises(ValueError, match="outputs that change with the other samples"):
        jacfunc.module_jacobian(coupled, per_sample=True)(x)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_passes_and_draws_as_without_a_look(randomness: Any) -> None:
    model, x = nn.Sequential(nn.Linear(3, 20), nn.Dropout(), nn.Linear(20, 2)).double(), batch()
    result = []
    for independent in ("always", True):
        torch.manual_seed(3)
        door = jacfunc.module_jacobian(
            model, per_sample=True, randomness=randomness, independent=independent
        )
        result += [door(x), torch.rand(2)]
    assert torch.equal(result[0]["2.weight"], result[2]["2.weight"])
    assert torch.equal(result[1], result[3])


def test_a_look_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)).double()
    seen: list[int] = []
    model[0].register_forward_hook(lambda m, given, out: seen.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, x = torch.get_rng_state(), batch()
    copy = x.clone()
    jacfunc.module_jacobian(model, per_sample=True, randomness="same")(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, copy)
    assert not x.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mix", [lambda x, y: x + y, lambda x, y: x + y.mean(1, keepdim=True)])
def test_batches_elsewhere_and_shared_inputs(mix: Callable[..., Tensor]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, *, y: Tensor, z: dict[str, Tensor]) -> Tensor:
            return self.layer(mix(x, y.T) * z["scale"])

    model, x = Two().double(), batch()
    door = jacfunc.module_jacobian(
        model, per_sample=True, in_dims={"y": 1, "z": None}, independent="always"
    )
    given = {"y": batch(seed=1).T.contiguous(), "z": {"scale": torch.ones(3).double()}}
    assert door(x, **given)["layer.weight"].shape == (B, 2, 2, 3)


def test_a_mixture_by_a_batch_that_is_elsewhere() -> None:
    class Turned(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.T - x.T.mean(0))

    door = jacfunc.module_jacobian(Turned(3, 2).double(), per_sample=True, in_dims=1)
    with pytest.raises(ValueError, match=MIXED):
        door(batch().T)


def test_without_parameters() -> None:
    assert jacfunc.module_jacobian(nn.Tanh(), "inputs", per_sample=True)(batch()).shape == (B, 3, 3)
    norm = nn.Softmax(0)
    with pytest.raises(ValueError, match=MIXED):
        jacfunc.module_jacobian(norm, "inputs", per_sample=True)(batch())


def test_numbers_that_differ_from_one_evaluation_to_the_next() -> None:
    flips = iter(range(1000))
    model = Mixing(lambda m, h: h * (1 + next(flips))).double()
    with pytest.raises(NotImplementedError, match="outputs change from one evaluation to the next"):
        DOORS["params"](model, batch())


# --- losses ---


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "of the mean": lambda out, y: out.mean(0).square().sum(),
    "contrastive": lambda out, y: F.cross_entropy(out @ out.T, torch.arange(len(out))),
    "root of the mean": lambda out, y: (out - y).square().mean().sqrt(),
    "worst sample": lambda out, y: (out - y).square().sum(1).max(),
    "detached scale": lambda out, y: (out - y).square().sum() / out.detach().square().sum(),
    "variance": lambda out, y: out.var(0).sum(),
    "neighbours": lambda out, y: (out[1:] - out[:-1]).square().sum(),
}
OF_LOSSES: dict[str, Callable[..., Any]] = {
    "norms": lambda m, loss, x, y, **more: jacfunc.gradient_norms(m, loss, **more)(x, y),
    "projection": lambda m, loss, x, y, **more: jacfunc.random_projection(m, 3, loss, **more)(x, y),
}


@pytest.mark.parametrize("door", OF_LOSSES.values(), ids=OF_LOSSES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_couple_outputs_are_refused(name: str, door: Callable[..., Any]) -> None:
    model, x, y = nn.Linear(3, 4).double(), batch(), torch.zeros(B, 4).double()
    with pytest.raises(ValueError, match="the loss must be a sum or mean over samples"):
        door(model, LOSSES[name], x, y)
    door(model, LOSSES[name], x, y, independent=True)


@pytest.mark.parametrize("door", OF_LOSSES.values(), ids=OF_LOSSES)
@pytest.mark.parametrize("worst", [0, B - 1])
def test_targets_alone_may_tell_which_sample_is_the_worst(
    worst: int, door: Callable[..., Any]
) -> None:
    model, y = nn.Linear(3, 4).double(), torch.zeros(B, 4).double()
    y[worst] = 100
    with pytest.raises(ValueError, match="the loss must be a sum or mean over samples"):
        door(model, LOSSES["worst sample"], batch(), y)


def test_a_loss_that_couples_later() -> None:
    loss = nn.SmoothL1Loss()
    norms = jacfunc.gradient_norms(nn.Linear(3, 4).double(), loss)
    x, y = batch(), torch.zeros(B, 4).double()
    for _ in range(3):
        norms(x, y)
    loss.register_forward_pre_hook(lambda m, given: (given[0] - given[0].mean(0), given[1]))
    with pytest.raises(ValueError, match="the loss must be a sum or mean over samples"):
        norms(x, y)


WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0]).double()
SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ignored": nn.CrossEntropyLoss(),
    "weighted": nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1),
    "by hand": lambda out, y: F.cross_entropy(out / 2, y) + 0.1 * out.square().mean(),
    "margins": lambda out, y: F.multi_margin_loss(out, y.clamp(min=0)),
}


@pytest.mark.parametrize("name", SUMS)
def test_means_by_their_targets_pass(name: str) -> None:
    model, x, y = nn.Linear(3, 4).double(), batch(), torch.tensor([0, 3, -100, 1, 2, -100])
    loss = SUMS[name]
    norms = jacfunc.gradient_norms(model, loss, independent="always")(x, y)
    out = model(x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(out, y), out)
    inputs = torch.cat([x, torch.ones(B, 1).double()], 1)
    torch.testing.assert_close(norms, grad.norm(dim=1) * inputs.norm(dim=1))


# --- products of the whole batch ---


def test_products_take_coupled_samples_but_no_pairs_of_them() -> None:
    ones = {"layer.weight": torch.ones(4, 3).double(), "layer.bias": torch.ones(4).double()}
    result = jacfunc.ggn(mixing("mean"), half_square)(batch(), TARGETS) @ ones
    assert result["layer.weight"].shape == (4, 3)
    curvature = jacfunc.ggn(mixing("all pairs"), half_square)(batch(), TARGETS)
    with pytest.raises(ValueError, match="ggn: outputs of a sample must have the same shape"):
        curvature @ ones


def test_products_of_as_many_outputs_as_samples() -> None:
    model, x = nn.Linear(3, B).double(), batch()
    vector = {name: torch.ones_like(param) for name, param in model.named_parameters()}
    result = jacfunc.ggn(model, half_square)(x, TARGETS) @ vector
    torch.testing.assert_close(result["bias"], (x.sum(1) + 1).sum().expand(B))


def test_a_module_for_batches_of_one_size_is_seen_whole() -> None:
    """Though few samples at once are to be evaluated."""
    model = Mixing(lambda m, h: h + m.w - h.mean(0), w=torch.zeros(20, 4)).double()
    norms = jacfunc.gradient_norms(model, half_square, chunk_size=2)
    with pytest.raises(ValueError, match=MIXED):
        norms(batch(20), TARGETS)


def test_where_memory_is_to_be_spared_one_graph_is_there_at_a_time() -> None:
    layers, x = tuple(torch.randn(20, 8, 8)), torch.randn(400, 8)

    def whole(params: Leaves, leaves: Leaves) -> Leaves:
        (h,) = leaves
        for weight in params:
            h = torch.tanh(h @ weight)
        return (h,)

    def peak(at_once: int | None) -> int:
        subject = Subject(whole, layers, Samples((x,), (0,)), 1, False, lambda: lambda: None)
        with PeakBytes() as counter:
            assert coupling(subject, 1, True, at_once).what is None
        return counter.peak

    assert peak(400) < 0.7 * peak(None)


class Outliers(nn.Module):
    """A wide network whose samples are independent but for one with a large input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8192), nn.Tanh(), nn.Linear(8192, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        is_far = (x.amax(1, keepdim=True) > 100).to(x.dtype)
        return out + is_far * out.mean(0)


def test_all_samples_of_a_large_batch_are_compared_in_groups() -> None:
    module, x, sizes = Outliers(), batch(300).float(), set[int]()
    module.register_forward_pre_hook(lambda _, given: sizes.add(len(given[0])))
    jacfunc.module_jacobian(module, "inputs", per_sample=True)(x)
    assert 64 <= max(sizes) < 300
    x[177, 0] = 1000.0
    with pytest.raises(ValueError, match=MIXED):
        jacfunc.module_jacobian(module, "inputs", per_sample=True)(x)


class LastState(nn.Module):
    """The last state of a recurrent layer, whose rows take three times their part of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.head = nn.RNN(28, 48, batch_first=True), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.read(x)[0][:, -1])
        return out


def test_pieces_take_little_beside_their_result() -> None:
    """A row of all samples took as much as three results."""
    net, sizes = LastState(), list[int]()
    net.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    x = torch.randn(668, 28, 28)
    jacobian = jacfunc.module_jacobian(net, "inputs", per_sample=True, independent=True)(x)
    assert max(sizes) <= 60
    first = x[-1:].clone().requires_grad_()
    rows = [torch.autograd.grad(out, first, retain_graph=True)[0][0] for out in net(first)[0]]
    torch.testing.assert_close(jacobian[-1], torch.stack(rows), rtol=1e-4, atol=1e-5)


def test_a_large_batch_is_swept_in_pieces_without_a_budget() -> None:
    net = nn.Sequential(nn.Linear(3, 40_000), nn.Tanh(), nn.Linear(40_000, 2))
    sizes: list[int] = []
    net.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    x = batch(512).float()
    by_inputs = jacfunc.module_jacobian(net, "inputs", per_sample=True, independent=True)
    jacobian = by_inputs(x)
    assert max(sizes[-4:]) < 512
    weight, first = net[2].weight, net[0]
    slopes = 1 - first(x).tanh().square()
    expected = torch.einsum("oh,bh,hi->boi", weight, slopes, first.weight)
    torch.testing.assert_close(jacobian, expected, rtol=1e-4, atol=1e-5)
