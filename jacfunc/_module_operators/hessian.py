"""The Hessian of a module's loss in its parameters, as a linear operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from jacfunc._calls import FlatCall
from jacfunc._curvature import LossFunction
from jacfunc._errors import ManyOutputs
from jacfunc._lending import Captured, Select, check_outermost
from jacfunc._losses import check_loss
from jacfunc._memory import Budget
from jacfunc._module_operators.evaluated import Evaluated
from jacfunc._modules import FunctionAsModule, ModuleCall, ModuleOptions
from jacfunc._showing import named
from jacfunc._types import Leaves, OfParams, Tree, is_differentiable
from jacfunc.operators import HessianOperator
from jacfunc.strategies import FirstDerivative

API = "module_hessian"


def module_hessian(
    module: nn.Module | OfParams[Any],
    loss: LossFunction,
    *,
    select: Select = None,
    copy: bool = True,
) -> Callable[..., HessianOperator]:
    """The Hessian of a loss in a module's parameters: products, blocks, or the whole matrix.

    ``H = ∂² loss(module(x), y) / ∂ params²``. For the positive semidefinite part of it, without the
    second derivatives of the module, see :func:`jacfunc.ggn`.

    Args:
        module: any ``nn.Module``, or a function ``func(params, *inputs)`` of a tree of parameters.
        loss: ``loss(outputs, targets)``, one number. It gets what the module returns.
        select: parameters, as in :func:`jacfunc.module_jacobian`: ``"head.*"`` for the last layer.
        copy: answer from copies of parameters, buffers and the batch, as in :func:`jacfunc.ggn`.

    Returns:
        A function of the module's own inputs, or of the function's, its parameters first; and, last
        among those by position, of the targets. It returns a
        :class:`jacfunc.operators.HessianOperator`, whose vectors are dicts by name, or trees like
        the parameters of a function: ``H @ v``, ``H.matrix()``, ``H.blocks()``, ``H.diagonal()``,
        ``H["0.*", "head.weight"]``, ``H.gradient()``, ``H.value``. It answers from the point at
        which it was made. Results are detached from the parameters; products can be differentiated
        by their vectors.

    Raises:
        TypeError, ValueError: arguments that do not fit, a loss that is not one number.
        NotImplementedError: inside a transform, and what torch has no second derivative of.

    Cost:
        One evaluation and one pullback, whose graph is kept. A product is a pullback through that:
        about two gradients. Samples may depend on each other.

    Example:
        >>> import torch, jacfunc
        >>> model = torch.nn.Linear(2, 1)
        >>> H = jacfunc.module_hessian(model, torch.nn.functional.mse_loss)(
        ...     torch.eye(2), torch.ones(2, 1)
        ... )
        >>> H @ {"weight": torch.tensor([[1.0, 0.0]]), "bias": torch.zeros(1)}
        {'weight': tensor([[1., 0.]]), 'bias': tensor([1.])}
        >>> H.blocks()["bias"], H.diagonal()["weight"]
        (tensor([[2.]]), tensor([[1., 1.]]))
    """
    check_loss(API, loss)
    options = LossOptions.read(API, module, select, None, None, None, None, copy=copy)

    def hessian_of(*args: Tree, **kwargs: Any) -> HessianOperator:
        check_outermost(API, (args, kwargs), "jacfunc.hessian or jacfunc.hvp")
        return options.hessian(loss, args, kwargs)

    return named(API, module, hessian_of)


class LossOptions(ModuleOptions):
    """The options of a door that takes a module, or a function, at a batch as a whole."""

    takes_functions: ClassVar[bool] = True

    def hessian(
        self, loss: LossFunction, args: tuple[Tree, ...], kwargs: dict[str, Any]
    ) -> HessianOperator:
        """The Hessian at one batch."""
        if not args:
            raise TypeError(
                f"{API}: the last positional argument must be the targets of the loss, got none. "
                "Call it as (inputs, targets)."
            )
        if not isinstance(self.module, nn.Module):
            module, (inputs, kwargs) = FunctionAsModule.called(
                API, self.module, (args[:-1], kwargs)
            )
            return replace(self, module=module).hessian(loss, (*inputs, args[-1]), kwargs)
        budget = Budget(API, None)
        state, (arguments, targets) = self.kept(((args[:-1], kwargs), args[-1]), budget)
        evaluated = Evaluated(ModuleCall(API, state, arguments), None)
        captured = Captured.of(loss)

        @contextmanager
        def around() -> Iterator[None]:
            captured.check(API, "the loss")
            with evaluated.around():
                yield

        func = OfLoss(evaluated.flat, loss, targets)
        gradient = FirstDerivative(func, evaluated.flat.primals, of_one_number=True)
        return HessianOperator(API, evaluated.domain, gradient, around)


class OfLoss:
    """The loss of a module's outputs, as a function of the leaves of the call."""

    def __init__(self, flat: FlatCall, loss: LossFunction, targets: Tree) -> None:
        self._flat, self._loss, self._targets = flat, loss, targets
        self.state = flat.state

    def __call__(self, *primals: Tensor) -> tuple[Leaves, Leaves]:
        output, _ = self._flat.value(*self._flat(*primals))
        value = self._loss(output, self._targets)
        if not is_differentiable(value) or value.numel() != 1:
            came = (
                f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            )
            raise ManyOutputs(
                f"the loss must be one floating number, got {came}. Use its mean or its sum."
            )
        return (value,), ()
