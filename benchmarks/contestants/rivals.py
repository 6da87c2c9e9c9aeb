"""Per-sample parameter Jacobians as other libraries give them; none of them need be there.

A library is imported where it is used: one that is not installed fails as its way is prepared, and
that is its row of the table.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn

from benchmarks.problems.judge import Answer
from benchmarks.problems.networks import CLASSES, parts
from jacfunc._measuring import Run
from jacfunc.compare import Problem

PACKAGES = (
    *("backpack-for-pytorch", "curvlinops-for-pytorch", "jax", "laplace-torch"),
    *("opacus", "torchjd", "transformers"),
)


def versions() -> dict[str, str | None]:
    """Versions of the rivals; None for one that is not installed."""
    by_name: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            by_name[package] = version(package)
    return by_name


def by_laplace(problem: Problem) -> Run:
    """Laplace's own call; the default backend, CurvlinopsGGN, inherits it from this class."""
    from laplace.curvature import CurvatureInterface

    model, images = parts(problem)
    backend = CurvatureInterface(model, "classification")
    return lambda: backend.jacobians(images)[0]


def by_opacus(problem: Problem) -> Run:
    """Hooks leave each sample's gradient at the parameters; a backward pass uses them up.
    They look in train mode only, and no layer here that it takes does anything else in it. They
    stay, so it has a copy of the model.
    """
    from opacus import GradSampleModule

    model, images = parts(problem)
    own = copy.deepcopy(model).train()
    hooked = GradSampleModule(own, loss_reduction="sum")
    return _class_by_class(own, hooked, images, "grad_sample")


def by_backpack(problem: Problem) -> Run:
    """BatchGrad, as Laplace uses it; first-order extensions need only the layers extended.
    What extends them stays, so it has a copy of the model.
    """
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model, images = parts(problem)
    own, sample = extend(copy.deepcopy(model)), BatchGrad()
    return _class_by_class(own, own, images, "grad_batch", lambda: backpack(sample))


def _class_by_class(
    own: nn.Module,
    model: nn.Module,
    images: Tensor,
    attribute: str,
    context: Callable[[], Any] = nullcontext,
) -> Run:
    """A forward and a backward pass a class; its rows go straight to where they belong."""
    params = dict(own.named_parameters())

    def run() -> Answer:
        answer: Answer = {}
        for number in range(CLASSES):
            total = model(images)[:, number].sum()
            with context():
                total.backward()
            for name, param in params.items():
                rows = getattr(param, attribute, None)
                if rows is None:
                    raise NotImplementedError(f"leaves no {attribute} at {name}")
                if number == 0:
                    answer[name] = rows.new_empty(len(rows), CLASSES, *param.shape)
                answer[name][:, number] = rows
                # or else the next class would be added
                setattr(param, attribute, None)
                param.grad = None
        return answer

    return run


def by_torchjd(problem: Problem) -> Run:
    """The rows of the whole batch at once, each pulled back through all samples."""
    from torchjd.autojac import jac

    model, images = parts(problem)
    names, params = zip(*model.named_parameters(), strict=True)

    def run() -> Answer:
        blocks = jac(model(images), params)
        split = (block.unflatten(0, (len(images), -1)) for block in blocks)
        return dict(zip(names, split, strict=True))

    return run
