"""The losses of torch that are known here, with the settings that they are called with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from jacfunc._losses.formulas import OfClasses, OfNumbers, SecondDerivative, Settings
from jacfunc._types import Leaves

MaybeKnown: TypeAlias = SecondDerivative | None

Formulas: TypeAlias = Callable[[Tensor, Tensor, Settings], MaybeKnown]
"""Gives the second derivative at outputs and targets; None where these have other shapes."""

DEFAULTS: Settings = {
    "weight": None,
    "pos_weight": None,
    "label_smoothing": 0.0,
    "ignore_index": -100,
    "reduction": "mean",
    "log_input": True,
    "full": False,
    "eps": 1e-8,
}
"""The settings of a loss that is called without any."""

FORMULA_NEEDS: Mapping[int, Settings] = {
    id(F.mse_loss): {"weight": None},  # the mean is taken over weights
    id(F.poisson_nll_loss): {"log_input": True},
}
"""Settings of functions without which no formula is known, by the identities of these."""

_SETTINGS = Tensor, float, int, str, type(None)
"""What settings may be."""


@dataclass(frozen=True)
class TorchLoss:
    """A loss of torch: its function, and the settings that it is called with."""

    function: Any
    own: Settings

    @classmethod
    def of(cls, loss: Any) -> TorchLoss | None:
        """From the function, by itself or with settings in a ``functools.partial``, or its module.

        None for what is no such loss, or has settings that are not known here; and for a module
        that hooks see, or that has a ``forward`` of its own.
        """
        own: Settings = {}
        if id(loss) in FORMULAS:  # by identity: a user's loss may not be hashable
            return _without_settings(loss)
        if type(loss) is cls:
            return loss
        if isinstance(loss, partial) and not loss.args:
            loss, own = loss.func, loss.keywords
        elif isinstance(loss, nn.Module):
            if _are_hooked(loss) or "forward" in vars(loss):
                return None
            own = {name: getattr(loss, name) for name in DEFAULTS if hasattr(loss, name)}
            loss = FUNCTION_OF.get(type(loss))
        if id(loss) not in FORMULAS or not own.keys() <= DEFAULTS.keys():
            return None
        return cls(loss, own) if all(isinstance(x, _SETTINGS) for x in own.values()) else None

    @property
    def settings(self) -> Settings:
        """All settings, those by default among them."""
        return {**DEFAULTS, **self.own}

    @property
    def has_formula(self) -> bool:
        """Is the second derivative known at outputs and targets that fit?"""
        needs = FORMULA_NEEDS.get(id(self.function))
        return not needs or all(self.settings[name] is value for name, value in needs.items())

    @property
    def reduction(self) -> Any:
        """The reduction, if it was set."""
        return self.own.get("reduction")

    def __call__(self, outputs: Any, targets: Any) -> Any:
        """The loss."""
        return self.function(outputs, targets, **self.own)

    @property
    def divided(self) -> tuple[LossKind, Leaves]:
        """What kind of loss it is, and the weights that it takes."""
        if not self.own:
            return LossKind(self.function), ()
        weights = {name: x for name, x in self.own.items() if isinstance(x, Tensor)}
        others = [pair for pair in self.own.items() if pair[0] not in weights]
        values = frozenset([(name, x) for name, x in others if x != DEFAULTS[name]])
        return LossKind(self.function, values, (*weights,)), (*weights.values(),)

    def at(self, outputs: Any, targets: Any) -> MaybeKnown:
        """The formula for the second derivative at outputs, if there is one for such arguments."""
        are_tensors = isinstance(outputs, Tensor) and isinstance(targets, Tensor)
        if not (are_tensors and outputs.dim() and self.has_formula):
            return None
        return FORMULAS[id(self.function)](outputs, targets, self.settings)


@cache
def _without_settings(function: Any) -> TorchLoss:
    """A loss that is called by its function alone: nothing of it changes from call to call."""
    return TorchLoss(function, {})


class LossKind(NamedTuple):
    """A loss of torch without the numbers of its weights. Equal ones are the same function."""

    function: Any
    values: frozenset[tuple[str, Any]] = frozenset()
    """Settings that are no tensors, and not those by default."""
    weights: tuple[str, ...] = ()
    """Names of those that are tensors."""

    def with_weights(self, weights: Iterable[Tensor]) -> TorchLoss:
        """The loss with these weights."""
        return TorchLoss(
            self.function, {**dict(self.values), **dict(zip(self.weights, weights, strict=True))}
        )


def _are_hooked(loss: nn.Module) -> bool:
    """Do hooks see calls of a module, its own or those that see all modules?"""
    of_all = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
    return any((loss._forward_hooks, loss._forward_pre_hooks, *of_all))


def check_loss(api: str, loss: object) -> None:
    """Refuse what is no function, and a class of losses in the place of a loss."""
    if not callable(loss) or isinstance(loss, type):
        kind = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
        raise TypeError(
            f"{api}: loss must be a function loss(outputs, targets), got {kind}. Pass "
            "torch.nn.functional.cross_entropy, or an instance of torch.nn.CrossEntropyLoss."
        )


def is_of_torch(loss: Any) -> bool:
    """Is it one of torch's own losses that are known here, which runs no code of the user's?"""
    return TorchLoss.of(loss) is not None


def known_formula(loss: Any, outputs: Any, targets: Any) -> MaybeKnown:
    """The second derivative of a loss; None if it is not known for the loss or its arguments."""
    known = TorchLoss.of(loss)
    return None if known is None else known.at(outputs, targets)


def _of_cross_entropy(outputs: Tensor, targets: Tensor, settings: Settings) -> MaybeKnown:
    of_classes = (*outputs.shape[:1], *outputs.shape[2:])
    expected = outputs.shape if targets.is_floating_point() else of_classes
    is_batch = outputs.dim() > 1 and targets.shape == expected
    return OfClasses(outputs, targets, settings) if is_batch else None


def _squares(settings: Settings, outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.new_full((), 2.0)


def _logits(settings: Settings, outputs: Tensor, targets: Tensor) -> Tensor:
    """``p (1 - p)``, exact where p is almost one, and what the two kinds of targets weigh."""
    weight, positive = settings["weight"], settings["pos_weight"]
    curvature = outputs.sigmoid().mul_((-outputs).sigmoid_())
    if positive is not None:
        curvature *= 1 + (positive - 1) * targets
    return curvature if weight is None else curvature * weight


def _rates(settings: Settings, outputs: Tensor, targets: Tensor) -> Tensor:
    """The rates, whose logarithms the outputs are."""
    return outputs.exp()


def _of_numbers(
    second: Callable[[Settings, Tensor, Tensor], Tensor],
    outputs: Tensor,
    targets: Tensor,
    settings: Settings,
) -> MaybeKnown:
    """The formula for a mean or sum over single outputs, with these second derivatives."""
    if outputs.shape != targets.shape:
        return None
    terms = outputs.numel() if settings["reduction"] == "mean" else 1
    is_weighted = settings["weight"] is not None or settings["pos_weight"] is not None
    return OfNumbers(outputs, targets, partial(second, settings), terms, is_weighted)


FORMULAS: Mapping[int, Formulas] = {
    id(F.cross_entropy): _of_cross_entropy,
    id(F.mse_loss): partial(_of_numbers, _squares),
    id(F.binary_cross_entropy_with_logits): partial(_of_numbers, _logits),
    id(F.poisson_nll_loss): partial(_of_numbers, _rates),
}
"""What makes the formula of a loss, by the identity of torch's function."""

FUNCTION_OF: Mapping[type, Any] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.MSELoss: F.mse_loss,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
}
