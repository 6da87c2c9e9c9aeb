"""A module is left as it was, byte for byte, after every kind of call and every failure."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import jacfunc
from tests.kinds.modules import MODULE_KINDS, B, floats
from tests.modules.test_module_kinds import CRASHES, HOOKS, REFUSALS, contents, snapshot, unchanged
from tests.truth.oracles import is_real_tensor, leaves_of, tree_map

# torch ends the process, or sets no hooks
SPARED = (*CRASHES, "TorchScript script", "TorchScript trace")
KINDS = {kind.name: kind for kind in MODULE_KINDS if kind.name not in SPARED}
WRT = ("params", "inputs", ("params", "inputs"))
STRATEGIES = ("reverse", "forward", "looped", "auto", "autotune")
RANDOMNESS = ("error", "same", "different")
MANY = settings(deadline=None, max_examples=150, derandomize=True, database=None)


# --- all that could change ---


def of_tensor(tensor: Tensor) -> tuple[Any, ...]:
    grad = tensor.grad if tensor.is_leaf else None
    of_grad = None if grad is None else (id(grad), contents(grad), grad._version)
    return id(tensor), type(tensor), contents(tensor), tensor._version, of_grad


def everything(module: nn.Module, given: Any) -> dict[str, Any]:
    """Bytes and identities, in order."""
    parts = dict(module.named_modules(remove_duplicate=False))
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {
        "tensors": {name: of_tensor(tensor) for name, tensor in tensors},
        "state_dict": [
            (k, contents(v)) for k, v in module.state_dict().items() if torch.is_tensor(v)
        ],
        "inputs": [of_tensor(leaf) for leaf in leaves_of(given) if torch.is_tensor(leaf)],
        "training": [part.training for part in parts.values()],
        "attributes": {n: [(k, id(v)) for k, v in vars(p).items()] for n, p in parts.items()},
        "parts": {name: id(part) for name, part in parts.items()},
        "hooks": {
            name: [(h, k, id(f)) for h in HOOKS for k, f in getattr(part, h, {}).items()]
            for name, part in parts.items()
        },
        "volatile": [sorted(part._non_persistent_buffers_set) for part in parts.values()],
        "random state": torch.get_rng_state().numpy().tobytes(),
        # torch imports sympy when it first counts, and sympy sets a filter
        "warnings": [filter for filter in warnings.filters if "sympy" not in str(filter)],
        "torch": snapshot(nn.Identity(), ())["torch"],
    }


untouched = partial(unchanged, look=everything)


# --- where it can fail ---


def fail(*_: Any) -> None:
    raise ArithmeticError("midway")


class Faulty(torch.autograd.Function):
    """The identity, until it is differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    backward = jvp = staticmethod(fail)


TRAPS = ("", "forward", "interrupt", "backward", "hook", "hook before", "hook of gradients")


class Around(nn.Module):
    """Writes into all that it has, and draws; then it may fail."""

    def __init__(self, inner: nn.Module, trap: str) -> None:
        super().__init__()
        self.inner, self.trap, self.steps = inner, trap, 0
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("volatile", torch.ones(2), persistent=False)
        self.history = [torch.ones(2)]
        for register in (
            self.register_forward_hook,
            inner.register_forward_pre_hook,
            inner.register_state_dict_post_hook,
            self.register_state_dict_pre_hook,
        ):
            register(lambda *_: None)
        if trap == "hook":
            inner.register_forward_hook(fail)
        if trap == "hook before":
            inner.register_forward_pre_hook(fail)
        if trap == "hook of gradients":
            self.register_full_backward_hook(fail)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.steps += 1
        self.history.append(self.calls)
        self.latest = self.history[0].mul_(2)
        self.register_buffer("registered", self.calls.clone())
        output = self.inner(*inputs, **kwargs)
        torch.rand(3)
        if self.trap == "forward":
            fail()
        if self.trap == "interrupt":
            raise KeyboardInterrupt
        if self.trap == "backward":
            return tree_map(lambda x: Faulty.apply(x) if is_real_tensor(x) else x, output)
        return output


def ask(module: nn.Module, given: Any, every: int, **options: Any) -> BaseException | None:
    """A Jacobian of a module in the middle of training; what became of it."""
    trained = [p for p in module.parameters() if p.is_leaf and p.requires_grad]
    for param in trained[::every]:  # the others have no gradient yet
        param.grad = torch.full_like(param, 3.0)
    torch.default_generator.manual_seed(7)
    inputs, kwargs = given
    with untouched(module, given):
        try:
            jacfunc.module_jacobian(module, **options)(*inputs, **kwargs)
        except (ArithmeticError, KeyboardInterrupt, RuntimeError, *REFUSALS) as error:
            return error
    return None


@MANY
@given(
    name=st.sampled_from(sorted(KINDS)),
    trap=st.sampled_from(TRAPS),
    wrt=st.sampled_from(WRT),
    per_sample=st.booleans(),
    strategy=st.sampled_from(STRATEGIES),
    randomness=st.sampled_from(RANDOMNESS),
    every=st.integers(1, 3),
)
def test_every_kind_is_left_as_it_was(name: str, trap: str, every: int, **options: Any) -> None:
    kind = KINDS[name]
    ask(Around(kind.make(), trap), (kind.inputs(), kind.kwargs()), every, **options)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4))),
    "frozen": lambda: nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2)),
}
CASES = [
    case
    for case in product(MODULES, TRAPS, ("whole", "same", "different"), STRATEGIES)
    if case[0] != "batch norm" or case[2] == "whole"
]


@pytest.mark.parametrize(("name", "trap", "how", "strategy"), CASES)
def test_in_train_mode(name: str, trap: str, how: str, strategy: str) -> None:
    """Each is known to come as far as it says."""
    options = {} if how == "whole" else {"per_sample": True, "randomness": how}
    for wrt in WRT:
        module = Around(MODULES[name]().double().train(), trap)
        given = ((floats(B, 3),), {})
        error = ask(module, given, 2, wrt=wrt, strategy=strategy, **options)
        if (name, strategy) == ("spectral norm", "forward") and isinstance(error, REFUSALS):
            continue  # before it comes to the trap
        if trap == "interrupt":
            assert isinstance(error, KeyboardInterrupt)
        elif trap:
            assert isinstance(error, ArithmeticError | RuntimeError)
        else:
            assert error is None or isinstance(error, REFUSALS)


class Late(nn.Linear):
    """Does something to itself when it runs."""

    def __init__(self, does: Callable[[nn.Module], Any]) -> None:
        super().__init__(3, 2)
        self.early = nn.ReLU()
        self.early.register_forward_hook(lambda *_: None)
        self.extra = {"deep": [torch.ones(2)]}
        self.does = does

    def forward(self, x: Tensor) -> Tensor:
        self.does(self)
        return super().forward(x)


LATE: dict[str, Callable[[Any], Any]] = {
    "mode": lambda m: m.eval(),
    "attribute gone": lambda m: delattr(m, "extra"),
    "parameter": lambda m: setattr(m, "late", nn.Parameter(torch.ones(2))),
    "buffer": lambda m: m.register_buffer("late", torch.ones(2)),
    "volatile buffer": lambda m: m.register_buffer("late", torch.ones(2), persistent=False),
    "part": lambda m: m.add_module("late", nn.ReLU()),
    "part gone": lambda m: m._modules.pop("early", None),
    "hook": lambda m: m.register_forward_hook(lambda *_: None),
    "hook of the state": lambda m: m.register_state_dict_post_hook(lambda *_: None),
    "hook gone": lambda m: m.early._forward_hooks.clear(),
    "list": lambda m: m.extra["deep"].append(torch.ones(2)),
    "tensor in a list": lambda m: m.extra["deep"][0].mul_(2),
    "gradient": lambda m: setattr(m.weight, "grad", None),
    "parameter written": lambda m: m.weight.data.mul_(2),
    "parameter written in place": lambda m: m.weight.detach().mul_(2),
}


@pytest.mark.parametrize("strategy", STRATEGIES[:3])
@pytest.mark.parametrize("wrt", WRT, ids=str)
@pytest.mark.parametrize("what", LATE)
def test_what_it_does_to_itself_is_undone(what: str, wrt: Any, strategy: str) -> None:
    module = Late(LATE[what]).double()
    error = ask(module, ((floats(B, 3),), {}), 1, wrt=wrt, strategy=strategy)
    assert error is None or isinstance(error, REFUSALS)
