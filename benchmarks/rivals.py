"""Per-sample parameter Jacobians as each library gives them; none but torch need be there.

A rival is imported where it is used: one that is not installed fails as it is prepared, and that
is its row of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

import jacfunc
from benchmarks.contestants import by_autograd_functional, by_torch_func
from benchmarks.workloads import Answer, Problem

Form = Literal["tree", "flat"]
"""Blocks ``[B, C, *param]`` by name, or one tensor ``[B, C, P]``; both in the module's order."""

Run = Callable[[], Any]

PACKAGES = (
    "backpack-for-pytorch",
    "curvlinops-for-pytorch",
    "laplace-torch",
    "neural-tangents",
    "opacus",
    "torchjd",
)


@dataclass(frozen=True)
class Rival:
    """``prepare`` gets a model of its own, for hooks stay on it; its run gives ``form``."""

    name: str
    form: Form
    prepare: Callable[[Problem], Run]


def versions() -> dict[str, str | None]:
    """Of the rivals; None for one that is not installed."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def by_jacfunc(problem: Problem, **options: Any) -> Run:
    return partial(
        jacfunc.module_jacobian(problem.model, per_sample=True, **options), problem.images
    )


def by_recipe(problem: Problem) -> Run:
    return by_torch_func(torch.func.jacrev, problem)


def by_recipe_and_concatenation(problem: Problem) -> Run:
    blocks = by_recipe(problem)
    return lambda: torch.cat([block.flatten(2) for block in blocks().values()], -1)


def by_whole_batch(problem: Problem) -> Run:
    """What ``CurvatureInterface.jacobians`` does in laplace-torch 0.3, in our words.

    Each of the B · C rows is pulled back through the whole batch. The parameters are not detached
    there, so that a graph of the sweep is kept until it ends.
    """
    model, images = problem.model, problem.images

    def scores(params: dict[str, Tensor]) -> Any:
        return functional_call(model, params, (images,))

    def run() -> Tensor:
        blocks = torch.func.jacrev(scores)(dict(model.named_parameters()))
        return torch.cat([block.flatten(2) for block in blocks.values()], -1).detach()

    return run


def by_laplace(problem: Problem) -> Run:
    """Laplace's own call; the default backend, CurvlinopsGGN, inherits it from this class."""
    from laplace.curvature import CurvatureInterface

    backend = CurvatureInterface(problem.model, "classification")
    return lambda: backend.jacobians(problem.images)[0]


def by_opacus(problem: Problem) -> Run:
    """Hooks leave each sample's gradient at the parameters; a backward pass uses them up.

    They look in train mode only, and no layer here does anything else in it.
    """
    from opacus import GradSampleModule

    model = GradSampleModule(problem.model.train(), loss_reduction="sum")
    return _class_by_class(problem, model, "grad_sample")


def by_backpack(problem: Problem) -> Run:
    """BatchGrad, as Laplace uses it; first-order extensions need only the layers extended."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    _, sample = extend(problem.model), BatchGrad()
    return _class_by_class(problem, problem.model, "grad_batch", lambda: backpack(sample))


def _class_by_class(
    problem: Problem, model: nn.Module, attribute: str, context: Callable[[], Any] | None = None
) -> Run:
    """A forward and a backward pass a class; its rows go straight to where they belong."""
    params = dict(problem.model.named_parameters())

    def backward(number: int) -> int:
        scores = model(problem.images)
        total = scores[:, number].sum()
        if context is None:
            total.backward()
        else:
            with context():
                total.backward()
        return int(scores.shape[1])

    def run() -> Answer:
        answer: Answer = {}
        number, classes = 0, 1
        while number < classes:
            classes = backward(number)
            for name, param in params.items():
                rows = getattr(param, attribute, None)
                if rows is None:
                    raise NotImplementedError(f"leaves no {attribute} at {name}")
                if number == 0:
                    answer[name] = rows.new_empty(len(rows), classes, *param.shape)
                answer[name][:, number] = rows
                # or else the next class would be added
                setattr(param, attribute, None)
                param.grad = None
            number += 1
        return answer

    return run


def by_torchjd(problem: Problem) -> Run:
    """The rows of the whole batch at once, each pulled back through all samples."""
    from torchjd.autojac import jac

    model, images = problem.model, problem.images
    names, params = zip(*model.named_parameters(), strict=True)

    def run() -> Answer:
        blocks = jac(model(images), params)
        split = (block.unflatten(0, (len(images), -1)) for block in blocks)
        return dict(zip(names, split, strict=True))

    return run


def by_torchjd_looped(problem: Problem) -> Run:
    """Sample by sample."""
    from torchjd.autojac import jac

    model, images = problem.model, problem.images
    names, params = zip(*model.named_parameters(), strict=True)

    def run() -> Answer:
        samples: Sequence[Any] = [jac(model(image[None])[0], params) for image in images]
        columns = zip(*samples, strict=True)
        return {name: torch.stack(blocks) for name, blocks in zip(names, columns, strict=True)}

    return run


def by_autograd_whole(vectorize: bool, problem: Problem) -> Run:
    """autograd.functional.jacobian of the batched call, in all parameters."""
    model, images = problem.model, problem.images
    names = [name for name, _ in model.named_parameters()]
    params = tuple(param.detach() for param in model.parameters())

    def scores(*values: Tensor) -> Any:
        return functional_call(model, dict(zip(names, values, strict=True)), (images,))

    def run() -> Answer:
        blocks: Any = torch.autograd.functional.jacobian(scores, params, vectorize=vectorize)
        return dict(zip(names, blocks, strict=True))

    return run


RECIPE, CONCATENATED = "vmap(jacrev)", "vmap(jacrev) + cat"
OURS, FLAT, LAPLACE = "jacfunc", "jacfunc flat", "Laplace"
WHOLE_BATCH = "jacrev of the whole batch"

RIVALS: tuple[Rival, ...] = (
    Rival(RECIPE, "tree", by_recipe),
    Rival(CONCATENATED, "flat", by_recipe_and_concatenation),
    Rival(OURS, "tree", by_jacfunc),
    Rival("jacfunc reverse", "tree", partial(by_jacfunc, strategy="reverse")),
    Rival(FLAT, "flat", partial(by_jacfunc, flat=True)),
    Rival(LAPLACE, "flat", by_laplace),
    Rival(WHOLE_BATCH, "flat", by_whole_batch),
    Rival("Opacus", "tree", by_opacus),
    Rival("BackPACK", "tree", by_backpack),
    Rival("TorchJD", "tree", by_torchjd),
    Rival("TorchJD, looped", "tree", by_torchjd_looped),
    Rival("autograd", "tree", partial(by_autograd_whole, False)),
    Rival("autograd vectorized", "tree", partial(by_autograd_whole, True)),
    Rival("autograd, looped", "tree", partial(by_autograd_functional, False)),
    Rival("autograd vectorized, looped", "tree", partial(by_autograd_functional, True)),
)
