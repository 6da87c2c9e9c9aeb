"""Every module kind × what it is differentiated by × batch or samples × strategy.

The judge is a loop of ``torch.autograd.grad`` over output entries, on a module of its own: made
anew and not copied, because torch can't copy a pruned one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import jacfunc
from tests.kinds.modules import MODULE_KINDS, ModuleKind
from tests.truth.oracles import (
    assert_same,
    float_leaves,
    is_real_tensor,
    leaves_of,
    place,
    tree_map,
)

SEED = 7
WRT = ("params", "inputs")
MODES = ("whole", "per sample")
STRATEGIES = ("reverse", "looped", "forward", "auto")
KINDS = {kind.name: kind for kind in MODULE_KINDS}
RANDOM_KINDS = [kind.name for kind in MODULE_KINDS if kind.is_random]
REFUSALS = (NotImplementedError, TypeError, ValueError)
# torch's attention with dropout ends the process under two vmaps and jvp
CRASHES = ("MultiheadAttention dropout", "TransformerEncoderLayer dropout")
# masks are drawn in the order of memory, which torch lays out another way in forward mode
OTHER_DRAWS = ("TransformerEncoderLayer dropout",)


def seed() -> None:
    """The CPU alone: torch.manual_seed costs more than most of these Jacobians."""
    torch.default_generator.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    seed()


# --- the judge ---


class Judged(NamedTuple):
    """Blocks by output leaf, then by parameter or input leaf, and what they belong to."""

    output: Any
    names: list[str]
    point: Any
    params: list[list[Tensor]]
    inputs: list[list[Tensor]]

    def tree(self, wrt: str) -> Any:
        """The reference in the tree that ``module_jacobian`` returns."""
        if wrt == "params":
            by_name = [dict(zip(self.names, row, strict=True)) for row in self.params]
            return place(self.output, by_name)
        single = self.point[0] if len(self.point) == 1 else self.point
        return place(self.output, [place(single, row) for row in self.inputs])


def is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def rows(out: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Blocks ``[*out, *leaf]``, a backward pass an entry; sparse gradients are made dense."""
    dtypes = [torch.promote_types(out.dtype, leaf.dtype) for leaf in leaves]
    shapes = [out.shape + leaf.shape for leaf in leaves]
    if not out.requires_grad or not leaves:
        return [torch.zeros(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)]
    grads = [
        torch.autograd.grad(entry, leaves, retain_graph=True, materialize_grads=True)
        for entry in out.reshape(-1)
    ]
    return [
        torch.stack([grad.to_dense() for grad in column]).reshape(shape).to(dtype)
        for column, shape, dtype in zip(zip(*grads, strict=True), shapes, dtypes, strict=True)
    ]


def judge(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Judged:
    point = tree_map(lambda x: x.clone().requires_grad_() if is_real_tensor(x) else x, inputs)
    # clones, because the module may write into its inputs
    copies = tree_map(lambda x: x.clone() if is_tensor(x) else x, (point, kwargs))
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    output = module(*copies[0], **copies[1])
    outs = float_leaves(output)
    by_params = [rows(out, list(params.values())) for out in outs]
    by_inputs = [rows(out, float_leaves(point)) for out in outs]
    return Judged(output, list(params), inputs, by_params, by_inputs)


def judge_samples(kind: ModuleKind, same_draws: bool) -> Judged:
    """Each sample as a batch of one, in a module that saw no other."""
    inputs, kwargs = kind.inputs(), kind.kwargs()
    size = next(len(leaf) for leaf in leaves_of((inputs, kwargs)) if is_tensor(leaf))
    singles = []
    for b in range(size):
        one = tree_map(lambda x, b=b: x[b : b + 1] if is_tensor(x) else x, (inputs, kwargs))
        if same_draws:
            seed()
        singles.append(judge(kind.make(), *one))
    return stacked(singles)


def stacked(singles: Sequence[Judged]) -> Judged:
    """Blocks ``[1, *out, 1, *in]`` of batches of one as ``[B, *out, *in]``."""
    params, inputs = [], []
    for i, out in enumerate(float_leaves(singles[0].output)):
        start = 1 if out.dim() else 0  # the loss of a batch has no batch in front
        by_params = zip(*(single.params[i] for single in singles), strict=True)
        by_inputs = zip(*(single.inputs[i] for single in singles), strict=True)
        params.append([torch.stack(b).flatten(0, start) for b in by_params])
        inputs.append([torch.stack(b).squeeze(1 + out.dim()).flatten(0, start) for b in by_inputs])
    return singles[0]._replace(params=params, inputs=inputs)


@cache
def judged(name: str, mode: str, same_draws: bool = False) -> Judged:
    kind = KINDS[name]
    with torch.random.fork_rng(devices=[]):
        module = kind.make()
        seed()
        if mode == "per sample":
            return judge_samples(kind, same_draws)
        return judge(module, kind.inputs(), kind.kwargs())


def assert_agrees(kind: ModuleKind, got: Any, want: Any) -> None:
    assert_same(got, want, rtol=kind.rtol, atol=kind.rtol / 10)


# --- what must not change ---


HOOKS = [name for name in vars(nn.Module()) if "_hooks" in name]


def contents(value: Tensor) -> tuple[Any, ...]:
    """The bytes, and what says how to read them."""
    dense = value.detach().to_dense().contiguous().flatten()
    return value.dtype, value.shape, value.requires_grad, dense.view(torch.uint8).numpy().tobytes()


def snapshot(module: nn.Module, arguments: Any) -> dict[str, Any]:
    """Bytes and identities of all that a call could touch."""
    parts = dict(module.named_modules(remove_duplicate=False))
    params = dict(module.named_parameters(remove_duplicate=False))
    tensors = params | dict(module.named_buffers(remove_duplicate=False))
    return {
        "tensors": {name: (id(value), contents(value)) for name, value in tensors.items()},
        "state_dict": list(module.state_dict()),
        "types": {name: type(value) for name, value in tensors.items()},
        "grad": {n: contents(p.grad) for n, p in params.items() if p.is_leaf and p.requires_grad},
        "training": {name: part.training for name, part in parts.items()},
        "hooks": {n: [list(getattr(part, h, ())) for h in HOOKS] for n, part in parts.items()},
        "inputs": [contents(leaf) for leaf in leaves_of(arguments) if is_tensor(leaf)],
        "random state": torch.get_rng_state().numpy().tobytes(),
        "torch": (
            torch.is_grad_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
            torch._C._functorch.peek_interpreter_stack(),
            torch.autograd.forward_ad._current_level,
        ),
    }


@contextmanager
def unchanged(
    module: nn.Module, arguments: Any, look: Callable[..., dict[str, Any]] = snapshot
) -> Iterator[None]:
    before = look(module, arguments)
    try:
        yield
    finally:
        after = look(module, arguments)
        changed = [what for what in before if before[what] != after[what]]
        assert not changed, f"changed: {changed}"


def made(kind: ModuleKind) -> nn.Module:
    """A module in the middle of training: its parameters have gradients."""
    module = kind.make()
    for param in module.parameters():
        if param.requires_grad:
            param.grad = torch.full_like(param, 3.0)
    return module


def jacobian_of(
    kind: ModuleKind, wrt: Any, mode: str, strategy: Any, *, fails: bool = False, **options: Any
) -> Any:
    """The Jacobian; or, where the module fails, it does so at its end, when most has happened."""
    module, inputs, kwargs = made(kind), kind.inputs(), kind.kwargs()
    if fails:
        module.register_forward_hook(fail)
    compute = jacfunc.module_jacobian(
        module, wrt, per_sample=mode == "per sample", strategy=strategy, **options
    )
    seed()
    with unchanged(module, (inputs, kwargs)):
        return compute(*inputs, **kwargs)


def fail(*_: Any) -> None:
    raise ArithmeticError("midway")


# --- every kind ---


NOT_BY_LAYERS = ("tensor hook", "autograd.grad inside")
"""Kinds that reverse mode can do, and strategy ``"structured"`` can't."""


def is_judged(name: str, mode: str, wrt: str, strategy: str) -> bool:
    """Random layers per sample need a word about their numbers: they have tests of their own."""
    if name in OTHER_DRAWS and strategy == "forward":
        return False
    return mode == "whole" or name not in RANDOM_KINDS


CASES = [
    pytest.param(*case, id="-".join(case))
    for case in product(KINDS, MODES, WRT, STRATEGIES)
    if is_judged(*case)
]


@pytest.mark.parametrize(("name", "mode", "wrt", "strategy"), CASES)
def test_every_kind(name: str, mode: str, wrt: str, strategy: str) -> None:
    kind = KINDS[name]
    if wrt == "inputs" and not float_leaves(kind.inputs()):
        with pytest.raises(TypeError, match="must hold at least one floating point tensor"):
            jacobian_of(kind, wrt, mode, strategy)
    elif refusals := kind.refusals_of(wrt, mode, strategy):
        by_torch = tuple(RuntimeError for refusal in refusals if refusal.is_torchs)
        words = "|".join(refusal.words for refusal in refusals)
        with pytest.raises((*REFUSALS, *by_torch), match=words) as caught:
            jacobian_of(kind, wrt, mode, strategy)
        assert by_torch or says_what_to_do(str(caught.value)), caught.value
    else:
        assert_agrees(kind, jacobian_of(kind, wrt, mode, strategy), judged(name, mode).tree(wrt))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in KINDS if name not in RANDOM_KINDS])
def test_layer_by_layer_every_kind_is_right_or_refused(name: str, mode: str) -> None:
    kind = KINDS[name]
    try:
        result = jacobian_of(kind, "params", mode, "structured")
    except (*REFUSALS, RuntimeError):
        assert kind.refusals_of("params", mode, "reverse") or name in NOT_BY_LAYERS
    else:
        assert_agrees(kind, result, judged(name, mode).tree("params"))


def says_what_to_do(message: str) -> bool:
    advice = message.rpartition(". ")[2].split()[0]
    verbs = {"Use", "Let", "Call", "Pass", "Convert", "Choose"}
    return message.startswith("module_jacobian: ") and advice in verbs


@pytest.mark.parametrize("name", KINDS)
def test_a_module_that_fails_is_left_as_it_was(name: str) -> None:
    strategy = "reverse" if name in CRASHES else "forward"
    for case in (("params", "whole", "reverse"), ("inputs", "per sample", strategy)):
        with pytest.raises((ArithmeticError, RuntimeError, *REFUSALS)):
            jacobian_of(KINDS[name], *case, fails=True)


KEEPS = ("remembered activation", "spectral_norm by hook", "pruned")


def plain_tensors(module: nn.Module) -> list[int]:
    """Modules kept as plain attributes, alone or in a list."""
    values = [value for part in module.modules() for value in vars(part).values()]
    flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return [id(value) for value in flat if is_tensor(value)]


@pytest.mark.parametrize("name", ["GRU", "parameters in a plain list", *KEEPS])
def test_plain_attributes_are_left_as_they_were(name: str) -> None:
    kind = KINDS[name]
    for strategy in STRATEGIES[:2]:
        module = kind.make()
        before = plain_tensors(module)
        jacfunc.module_jacobian(module, "inputs", strategy=strategy)(*kind.inputs())
        assert plain_tensors(module) == before


# --- random layers ---


CHUNKED = {
    "reverse by 2": jacfunc.Reverse(chunk_size=2),
    "forward by 3": jacfunc.Forward(chunk_size=3),
    "columns": jacfunc.Looped(over="columns"),
}


@pytest.mark.parametrize(("name", "strategy"), list(product(RANDOM_KINDS, CHUNKED)))
def test_all_chunks_see_the_same_draw(name: str, strategy: str) -> None:
    kind = KINDS[name]
    got = jacobian_of(kind, "inputs", "whole", CHUNKED[strategy])
    if name in OTHER_DRAWS and not strategy.startswith("reverse"):
        assert_agrees(kind, got, jacobian_of(kind, "inputs", "whole", "forward"))
    else:
        assert_agrees(kind, got, judged(name, "whole").tree("inputs"))


def random_cases() -> Iterator[Any]:
    for name, randomness, strategy in product(
        RANDOM_KINDS, ("error", "same", "different"), STRATEGIES
    ):
        case = (name, randomness, strategy)
        reason, run = "", True
        if name in CRASHES and strategy == "forward":
            reason, run = "torch ends the process", False
        marks = [pytest.mark.xfail(strict=True, reason=reason, run=run)] if reason else []
        yield pytest.param(*case, id="-".join(case), marks=marks)


def is_looped(name: str, strategy: str) -> bool:
    """Do samples go one by one?"""
    return strategy == "looped" or (strategy == "forward" and not KINDS[name].runs_under_vmap)


@pytest.mark.parametrize(("name", "randomness", "strategy"), list(random_cases()))
def test_random_layers_per_sample(name: str, randomness: str, strategy: str) -> None:
    kind = KINDS[name]

    def compute(strategy: str) -> Any:
        return jacobian_of(kind, "inputs", "per sample", strategy, randomness=randomness)

    if randomness == "error" or kind.refusals_of("inputs", "per sample", strategy):
        with pytest.raises(NotImplementedError, match=r"Use strategy='looped'|randomness"):
            compute(strategy)
    elif randomness == "same":
        assert_agrees(kind, compute(strategy), judged(name, "per sample", True).tree("inputs"))
    elif is_looped(name, strategy):
        assert_agrees(kind, compute(strategy), judged(name, "per sample").tree("inputs"))
    else:
        got = compute(strategy)
        assert_agrees(kind, got, compute("reverse"))
        assert not torch.equal(got, judged(name, "per sample", True).tree("inputs"))


class OwnGenerator(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(3, generator=self.generator)

    def state(self) -> Any:
        return self.generator.get_state().tolist()


class PythonsRandom(nn.Module):
    """Draws from Python, as stochastic depth does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()

    def state(self) -> Any:
        return random.getstate()


@pytest.mark.parametrize(
    "make",
    [
        OwnGenerator,
        pytest.param(
            PythonsRandom,
            marks=pytest.mark.xfail(strict=True, reason="only torch's generators are rewound"),
        ),
    ],
)
def test_other_generators_are_rewound_too(make: type[nn.Module]) -> None:
    module, x = make(), torch.ones(3)
    before = module.state()
    results = [
        jacfunc.module_jacobian(module, "inputs", strategy=jacfunc.Forward(chunk_size))(x)
        for chunk_size in (None, 1)
    ]
    assert module.state() == before
    assert torch.equal(*results)


# --- what auto falls back to, and what errors say ---


def test_auto_goes_backward_where_columns_can_not_be_batched() -> None:
    module = nn.Sequential(nn.Linear(1, 2), nn.RReLU(), nn.Linear(2, 400)).eval()
    x = torch.ones(1, 1)
    expected = jacfunc.module_jacobian(module, "inputs", strategy="reverse")(x)
    torch.testing.assert_close(jacfunc.module_jacobian(module, "inputs")(x), expected)


UNCLEAR = {
    "integers by inputs": (
        lambda: jacfunc.module_jacobian(nn.Embedding(5, 2), "inputs")(torch.tensor([1])),
        r"wrt|select",
    ),
    "lazy parameters": (
        lambda: jacfunc.module_jacobian(nn.LazyLinear(2))(torch.ones(1, 3)),
        r"[Cc]all the module",
    ),
    "random layers": (
        lambda: jacfunc.module_jacobian(
            nn.Dropout(), "inputs", per_sample=True, strategy="reverse"
        )(torch.ones(2, 3)),
        r"randomness='(same|different)'",
    ),
    "wrong shapes": (
        lambda: jacfunc.module_jacobian(nn.Linear(3, 2), per_sample=True, strategy="reverse")(
            torch.ones(2, 4)
        ),
        r"shapes cannot be multiplied(?!.*looped)",
    ),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_errors_speak_of_modules(case: str) -> None:
    build, words = UNCLEAR[case]
    with pytest.raises((*REFUSALS, RuntimeError), match=words) as caught:
        build()
    assert "argnums" not in str(caught.value)
    assert says_what_to_do(str(caught.value)) or case == "wrong shapes"
