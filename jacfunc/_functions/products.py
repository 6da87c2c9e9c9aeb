"""``jvp``, ``vjp`` and ``hvp``: products with the Jacobian and the Hessian, without either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, Literal, overload

from jacfunc._arguments import check_like
from jacfunc._calls import at_all
from jacfunc._linear_map import JacobianOperator
from jacfunc._planning import HESSIAN_PRODUCTS
from jacfunc._showing import named
from jacfunc._types import AuxT, InT, No, OutT, Tree, Trees
from jacfunc.strategies import SecondCall, in_words_of

MUST = "the function must be one that this product can be taken of"
PULL, PUSH = (
    f" Use {instead}, or write the function in other operations." for instead in ("vjp", "jvp")
)
LESS = " Take smaller arguments, or fewer at once."


@overload
def jvp(
    func: Callable[..., OutT], primals: Trees, tangents: Trees, *, has_aux: No = False
) -> tuple[OutT, OutT]: ...
@overload
def jvp(
    func: Callable[..., tuple[OutT, AuxT]],
    primals: Trees,
    tangents: Trees,
    *,
    has_aux: Literal[True],
) -> tuple[OutT, OutT, AuxT]: ...
def jvp(
    func: Callable[..., Any], primals: Trees, tangents: Trees, *, has_aux: bool = False
) -> tuple[Any, ...]:
    """J·v without J: pushes one tangent through ``func``.

    ``v ↦ J(x) v``. With a unit tangent this is one column of the Jacobian.

    Args:
        func: takes trees, returns a tree of tensors, or ``(output, aux)`` with ``has_aux``.
        primals: the arguments, all differentiated.
        tangents: trees like ``primals``; dicts are matched by key, and None stands for what is not
            floating.
        has_aux: ``func`` returns ``(output, aux)``.

    Returns:
        ``(output, output tangent)``, or ``(output, output tangent, aux)``; tangents are ``[*out]``.

    Raises:
        TypeError, ValueError: tangents that do not fit. NotImplementedError: operations whose
            forward mode torch lacks or gets wrong.

    Cost:
        One evaluation with a tangent.

    Example:
        >>> import torch, jacfunc
        >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> jacfunc.jvp(lambda x: A @ x, (torch.ones(2),), (torch.tensor([1.0, 0.0]),))
        (tensor([3., 7.]), tensor([1., 3.]))
    """
    call = at_all("jvp", func, primals, has_aux)
    operator = JacobianOperator(call, call.primals)
    seeds = call.aligned_tangents(tangents)
    check_like("jvp", "tangents", seeds, call.primals)
    products = in_words_of("jvp", lambda: operator.pushforward(seeds), MUST, PULL, LESS)
    value, aux = call.value(*operator.image())
    pushed = call.output_tree(products)
    return (value, pushed, aux) if has_aux else (value, pushed)


@overload
def vjp(
    func: Callable[Concatenate[InT, ...], OutT], primal: InT, /, *, has_aux: No = False
) -> tuple[OutT, Callable[[OutT], tuple[InT]]]: ...
@overload
def vjp(
    func: Callable[..., OutT], *primals: Tree, has_aux: No = False
) -> tuple[OutT, Callable[[OutT], tuple[Tree, ...]]]: ...
@overload
def vjp(
    func: Callable[..., tuple[OutT, AuxT]], *primals: Tree, has_aux: Literal[True]
) -> tuple[OutT, Callable[[OutT], tuple[Tree, ...]], AuxT]: ...
def vjp(func: Callable[..., Any], *primals: Tree, has_aux: bool = False) -> tuple[Any, ...]:
    """vᵀ·J without J: evaluates ``func`` once and returns its pullback.

    ``v ↦ J(x)ᵀ v``. With a unit cotangent this is one row of the Jacobian.

    Args:
        func: takes trees, returns a tree of tensors, or ``(output, aux)`` with ``has_aux``.
        primals: the arguments, all differentiated.
        has_aux: ``func`` returns ``(output, aux)``.

    Returns:
        ``(output, pullback)`` or ``(output, pullback, aux)``. ``pullback(cotangent)`` takes a tree
        like the output and returns a tuple of trees like the primals, as often as you like.

    Raises:
        TypeError, ValueError: cotangents that do not fit.

    Cost:
        One evaluation, whose graph lives as long as the pullback; one pullback a call.

    Example:
        One row of a Jacobian, and one element of it, without the rest:

        >>> import torch, jacfunc
        >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> value, pullback = jacfunc.vjp(lambda x: A @ x, torch.ones(2))
        >>> (row,) = pullback(torch.tensor([0.0, 1.0]))
        >>> row, row[0].item()
        (tensor([3., 4.]), 3.0)
    """
    call = at_all("vjp", func, primals, has_aux)
    operator = JacobianOperator(call, call.primals)
    value, aux = call.value(*in_words_of("vjp", operator.image, MUST, PUSH, LESS))

    def pullback(cotangents: Tree) -> Tree:
        seeds = call.aligned_outputs("cotangents", cotangents)
        check_like("vjp", "cotangents", seeds, operator.outputs)
        products = in_words_of("vjp", lambda: operator.pullback(seeds), MUST, PUSH, LESS)
        return call.input_tree(products)

    named("vjp", func, pullback)
    return (value, pullback, aux) if has_aux else (value, pullback)


@overload
def hvp(
    func: Callable[Concatenate[InT, ...], OutT],
    primals: tuple[InT],
    tangents: tuple[InT],
    *,
    has_aux: No = False,
) -> tuple[OutT, tuple[InT]]: ...
@overload
def hvp(
    func: Callable[..., OutT], primals: Trees, tangents: Trees, *, has_aux: No = False
) -> tuple[OutT, tuple[Tree, ...]]: ...
@overload
def hvp(
    func: Callable[..., tuple[OutT, AuxT]],
    primals: Trees,
    tangents: Trees,
    *,
    has_aux: Literal[True],
) -> tuple[OutT, tuple[Tree, ...], AuxT]: ...
def hvp(
    func: Callable[..., Any], primals: Trees, tangents: Trees, *, has_aux: bool = False
) -> tuple[Any, ...]:
    """H·v without H: pulls one vector back through the graph of the gradient of ``func``.

    ``v ↦ ∂²f(x) v`` (Pearlmutter, "Fast exact multiplication by the Hessian", 1994), by reverse
    over reverse mode. Where that takes milliseconds, a pushforward is pulled back instead if that
    was faster: the second and third calls of a kind are timed, the fourth tries it. Where torch
    refuses an order of modes, the next is taken.

    Args:
        func: takes trees, returns one number, or ``(number, aux)`` with ``has_aux``.
        primals: the arguments, all differentiated.
        tangents: trees like ``primals``; dicts are matched by key, and None stands for what is not
            floating.
        has_aux: ``func`` returns ``(number, aux)``.

    Returns:
        ``(value, product)``, or ``(value, product, aux)``; the product is a tuple of trees like
        ``primals``, with leaves ``[*in]``.

    Raises:
        TypeError, ValueError: tangents that do not fit, or a function of more than one number.
        NotImplementedError: what torch has no second derivative of, in no order of modes.

    Cost:
        One evaluation and two pullbacks, the second one through three times as many operations; two
        to four gradients in all. No graph of the product is kept, unless it may be differentiated.

    Example:
        >>> import torch, jacfunc
        >>> x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
        >>> jacfunc.hvp(lambda x: (x ** 3).sum(), (x,), (v,))
        (tensor(9.), (tensor([6., 0.]),))
    """
    call = at_all("hvp", func, primals, has_aux)
    second = SecondCall(call, of_one_number=True)
    operator = JacobianOperator(second, call.primals)
    seeds = call.aligned_tangents(tangents)
    check_like("hvp", "tangents", seeds, call.primals)
    products = in_words_of(
        "hvp",
        lambda: HESSIAN_PRODUCTS.run(
            operator, lambda plan: second.product(operator, seeds, plan.strategy, last=True)
        ),
        MUST,
        " Write the function in other operations.",
        LESS,
    )
    value, aux = second.value(*operator.image())
    pulled = call.input_tree(products)
    return (value, pulled, aux) if has_aux else (value, pulled)
