"""Every HuggingFace family × mode × door, against loops of ``torch.autograd.grad`` over samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from operator import attrgetter
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacfunc
from tests.kinds.families import FAMILIES, Batch, of_classes
from tests.kinds.modules import B, Calls
from tests.modules.test_module_kinds import rows
from tests.truth.oracles import assert_same, float_leaves, place

pytest.importorskip("transformers", reason="the extra test-hf is not installed")

# peft still asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
MODES = ("eval", "train", "checkpointed")


class Truth(NamedTuple):
    """What loops give for each output leaf: per sample, the batch is in front."""

    output: Any
    params: list[dict[str, Tensor]]
    inputs: list[Tensor]

    def by_params(self, names: list[str]) -> Any:
        chosen = [{name: blocks[name] for name in names} for blocks in self.params]
        return place(self.output, chosen)


def looped(module: nn.Module, batch: Batch, wrt: str) -> Truth:
    """The Jacobian of a batch, a backward pass a row."""
    batch = {key: value.clone() for key, value in batch.items()}
    params = {name: param for name, param in module.named_parameters() if param.requires_grad}
    leaves = [*params.values(), *([batch[wrt].requires_grad_()] if wrt else [])]
    output = module(**batch)
    blocks = [rows(out, leaves) for out in float_leaves(output)]
    by_params = [dict(zip(params, of_leaf[: len(params)], strict=True)) for of_leaf in blocks]
    return Truth(output, by_params, [of_leaf[-1] for of_leaf in blocks] if wrt else [])


def looped_by_samples(module: nn.Module, batch: Batch, wrt: str) -> Truth:
    """The same of each sample alone, as a batch of one: blocks ``[B, *out, …]``."""
    ones = [{key: value[b : b + 1] for key, value in batch.items()} for b in range(B)]
    singles = [looped(module, one, wrt) for one in ones]
    by_params = [
        {key: torch.cat([single.params[n][key] for single in singles]) for key in blocks}
        for n, blocks in enumerate(singles[0].params)
    ]
    outs = float_leaves(singles[0].output) if wrt else []
    inputs = [
        torch.cat([single.inputs[n].squeeze(out.dim()) for single in singles])
        for n, out in enumerate(outs)
    ]
    return Truth(singles[0].output, by_params, inputs)


@cache
def truth(name: str, mode: str, by_inputs: bool = False, whole: bool = False) -> Truth:
    """Checkpoints change no number: the loops run without."""
    if mode == "checkpointed":
        return truth(name, "train", by_inputs, whole)
    family = FAMILIES[name]
    if family.batch is family.embedded and family.wrt and not by_inputs:
        return truth(name, mode, True, whole)
    batch, wrt = (family.embedded, family.wrt) if by_inputs else (family.batch, "")
    return (looped if whole else looped_by_samples)(family.make(mode), batch(), wrt)


class Case:
    """A family in a mode, as doors are called with it, and what they must give."""

    def __init__(self, name: str, mode: str) -> None:
        self.name, self.mode, self.family = name, mode, FAMILIES[name]
        self.module, self.batch = self.family.make(mode), self.family.batch()
        self.names = chosen(self.module)
        self.options: dict[str, Any] = {"select": self.names, "per_sample": True}
        self.is_coupled = self.family.couples and mode != "eval"

    @property
    def truth(self) -> Truth:
        return truth(self.name, self.mode, whole=self.is_coupled)

    @property
    def inputs_truth(self) -> Truth:
        return truth(self.name, self.mode, by_inputs=True)

    @property
    def picked(self) -> nn.Module:
        """The model as a module of one tensor, for doors that take no keywords."""
        key = self.family.output
        return Calls(self.module, lambda model, batch: model(**batch)[key])

    @property
    def picked_names(self) -> list[str]:
        return [f"inner.{name}" for name in self.names]

    @property
    def blocks(self) -> dict[str, Tensor]:
        """The Jacobian of ``picked``, by its names."""
        leaves = self.truth.by_params(self.names)[self.family.output]
        return {f"inner.{name}": block for name, block in leaves.items()}

    @property
    def output(self) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.module(**self.batch)[self.family.output]
        return output

    @property
    def matrix(self) -> Tensor:
        """The same as ``[B, M, P]``."""
        shape = (B, self.output[0].numel(), -1)
        return torch.cat([block.reshape(shape) for block in self.blocks.values()], 2)

    @property
    def targets(self) -> Tensor:
        return self.family.targets(self.output)

    def curvature(self) -> tuple[Tensor, Tensor]:
        """The gradient ``[B, M]`` of the loss in the outputs, and its Hessian, by loops."""
        point = self.output.requires_grad_()
        loss = self.family.loss(point, self.targets)
        (slope,) = torch.autograd.grad(loss, point, create_graph=True)
        (hessian,) = rows(slope, [point])
        return slope.detach().flatten(1).double(), hessian.double().reshape(
            point.numel(), point.numel()
        )

    def gauss_newton(self) -> Tensor:
        """``Jᵀ H J``, ``[P, P]``."""
        flat = self.matrix.flatten(0, 1)
        return flat.T @ self.curvature()[1] @ flat


def chosen(module: nn.Module) -> list[str]:
    """The first parameter of each name in each class of layers, and the last of all."""
    firsts: dict[Any, str] = {}
    trained = [name for name, param in module.named_parameters() if param.requires_grad]
    for name in trained:
        path, _, own = name.rpartition(".")
        firsts.setdefault((type(module.get_submodule(path)), own), name)
    return list(dict.fromkeys([*firsts.values(), trained[-1]]))


# --- the doors: each returns what jacfunc gives, and what it must be ---

Answer = tuple[Any, Any]


def by_strategy(strategy: str) -> Callable[[Case], Answer]:
    def door(case: Case) -> Answer:
        jac = jacfunc.module_jacobian(case.module, strategy=strategy, **case.options)
        return jac(**case.batch), case.truth.by_params(case.names)

    return door


def whole(case: Case) -> Answer:
    jac = jacfunc.module_jacobian(case.module, select=case.names)
    return jac(**case.batch), case.truth.by_params(case.names)


def all_parameters(case: Case) -> Answer:
    jac = jacfunc.module_jacobian(case.module, per_sample=True)
    return jac(**case.batch), case.truth.by_params(list(case.truth.params[0]))


def flat(case: Case) -> Answer:
    jac = jacfunc.module_jacobian(case.picked, select=case.picked_names, per_sample=True, flat=True)
    return jac(case.batch), case.matrix


def inputs(case: Case) -> Answer:
    by = {"inputs": case.family.wrt, "per_sample": True}
    got = jacfunc.module_jacobian(case.module, "inputs", **by)(**case.family.embedded())
    return got, place(case.inputs_truth.output, case.inputs_truth.inputs)


def both(case: Case) -> Answer:
    by = {"inputs": case.family.wrt} | case.options
    jac = jacfunc.module_jacobian(case.module, ("params", "inputs"), **by)
    want = case.inputs_truth
    by_params = [{name: blocks[name] for name in case.names} for blocks in want.params]
    return jac(**case.family.embedded()), place(
        want.output, list(zip(by_params, want.inputs, strict=True))
    )


def stream(case: Case, by: Any) -> Any:
    of = jacfunc.stream_jacobian(case.picked, by, select=case.picked_names, per_sample=True)
    return of(case.batch)


def stream_of_params(case: Case) -> Answer:
    return dict(stream(case, "params")), case.blocks


def stream_of_rows(case: Case) -> Answer:
    parts = [block for _, block in stream(case, "rows")]
    got = {name: torch.cat([part[name] for part in parts], 1) for name in case.picked_names}
    return got, {
        name: block.flatten(1, case.output.dim() - 1) for name, block in case.blocks.items()
    }


def stream_of_samples(case: Case) -> Answer:
    parts = [block for _, block in stream(case, "samples")]
    return {n: torch.cat([part[n] for part in parts]) for n in case.picked_names}, case.blocks


def ntk(case: Case) -> Answer:
    got = jacfunc.ntk(case.picked, case.picked_names, (case.batch,))
    want = torch.einsum("aip,bjp->abij", case.matrix, case.matrix).to(case.output)
    return got, want.reshape(B, B, *case.output.shape[1:] * 2)


def gradient_norms(case: Case) -> Answer:
    of = jacfunc.gradient_norms(case.picked, case.family.loss, select=case.picked_names)
    slope, _ = case.curvature()
    want = torch.einsum("bm,bmp->bp", slope, case.matrix).norm(dim=1)
    return of(case.batch, case.targets), want


def ggn(case: Case) -> jacfunc.GaussNewton:
    key, loss = case.family.output, case.family.loss
    of = jacfunc.ggn(case.module, lambda out, y: loss(out[key], y), select=case.names)
    return of(case.targets, **case.batch)


def in_a_row(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in named.values()])


def ggn_product(case: Case) -> Answer:
    vector = {name: torch.randn_like(case.module.get_parameter(name)) for name in case.names}
    return in_a_row(ggn(case) @ vector), case.gauss_newton() @ in_a_row(vector)


def ggn_diagonal(case: Case) -> Answer:
    return in_a_row(ggn(case).diagonal()), case.gauss_newton().diagonal()


def scores(case: Case, draws: int, generator: torch.Generator) -> Tensor:
    """Minus the gradients of log likelihoods at targets that are drawn, ``[K, B, M]``."""
    output = case.output
    if case.family.loss is not of_classes:
        noise = torch.randn(draws, *output.shape, generator=generator, dtype=output.dtype)
        return noise.flatten(2)
    chances = output.softmax(-1)
    drawn = torch.multinomial(chances.flatten(0, -2), draws, True, generator=generator)
    hits = F.one_hot(drawn.T, output.shape[-1]).reshape(draws, *output.shape)
    return (chances - hits).flatten(2)


def fisher(case: Case) -> Answer:
    likelihood: Any = "categorical" if case.family.loss is of_classes else "gaussian"
    one, same = (torch.Generator().manual_seed(7) for _ in range(2))
    of = jacfunc.fisher(case.picked, likelihood, draws=2, generator=one, select=case.picked_names)
    gradients = torch.einsum("kbm,bmp->kbp", scores(case, 2, same).to(case.matrix), case.matrix)
    return in_a_row(of(case.batch).diagonal()), gradients.square().sum((0, 1)) / (2 * B)


def random_projection(case: Case) -> Answer:
    """The random matrix is that of a module of the same parameters whose Jacobian is one."""
    select = {"select": case.picked_names}

    def parameters(model: nn.Module, x: Tensor) -> Tensor:
        every = torch.cat([attrgetter(name)(model).flatten() for name in case.names])
        return every.expand(len(x), -1)

    identity = Calls(case.module, parameters)
    (signs,) = jacfunc.random_projection(identity, 5, **select)(torch.zeros(1))
    assert torch.equal(signs.abs(), torch.full_like(signs, 5**-0.5))
    got = jacfunc.random_projection(case.picked, 5, **select)(case.batch)
    return got, (case.matrix @ signs).reshape(*case.output.shape, 5)


DOORS = {
    "whole": whole,
    "all parameters": all_parameters,
    **{name: by_strategy(name) for name in ("auto", "reverse", "looped", "structured")},
    "flat": flat,
    "inputs": inputs,
    "both": both,
    "stream of parameters": stream_of_params,
    "stream of rows": stream_of_rows,
    "stream of samples": stream_of_samples,
    "ntk": ntk,
    "gradient_norms": gradient_norms,
    "ggn product": ggn_product,
    "ggn diagonal": ggn_diagonal,
    "fisher": fisher,
    "random_projection": random_projection,
}


def is_there(name: str, mode: str, door: str) -> bool:
    family = FAMILIES[name]
    if door in ("inputs", "both") and not family.wrt:
        return False
    return mode != "checkpointed" or family.has_checkpoints


CASES = [
    pytest.param(*case, id="-".join(case))
    for case in product(FAMILIES, MODES, DOORS)
    if is_there(*case)
]


@pytest.mark.parametrize(("name", "mode", "door"), CASES)
def test_every_family(name: str, mode: str, door: str) -> None:
    pytest.importorskip(FAMILIES[name].package, reason="the extra test-hf is not installed")
    case = Case(name, mode)
    if case.is_coupled and door != "whole":
        words = "samples that do not depend on each other|batch normalization over the batch"
        with pytest.raises(ValueError, match=words):
            DOORS[door](case)
        return
    assert_agrees(*DOORS[door](case), case.family.rtol)


def assert_agrees(got: Any, want: Any, rtol: float) -> None:
    """Within what rounding makes of the largest entry."""
    largest = max(float(block.abs().max()) for block in float_leaves(want))
    assert_same(got, want, rtol=rtol, atol=rtol * largest)


@pytest.mark.parametrize("name", ["BERT", "Llama", "T5"])
def test_adapters_may_be_switched_off(name: str) -> None:
    pytest.importorskip("peft", reason="the extra test-hf is not installed")
    case = Case(f"{name} with LoRA", "eval")
    batch, wrt, rtol = case.family.embedded(), case.family.wrt, case.family.rtol
    jac = jacfunc.module_jacobian(case.module, "inputs", inputs=wrt, per_sample=True)
    with_adapters = place(case.inputs_truth.output, case.inputs_truth.inputs)
    assert_agrees(jac(**batch), with_adapters, rtol)
    with case.module.disable_adapter():
        want = looped_by_samples(case.module, batch, wrt)
        assert_agrees(jac(**batch), place(want.output, want.inputs), rtol)
    assert_agrees(jac(**batch), with_adapters, rtol)
