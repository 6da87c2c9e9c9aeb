"""The generalized Gauss-Newton matrix at a point: products, diagonal, blocks, or all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Generic

import torch
from torch import Tensor

from jacfunc._curvature.loss import OutputCurvature
from jacfunc._curvature.products import BatchProducts
from jacfunc._curvature.sums import NamedParts, added_up
from jacfunc._errors import Refused
from jacfunc._factored import add_squares, rows, written
from jacfunc._linear_map import LinearMap, is_followed, one_by_one
from jacfunc._modules import BatchOutputs, ModuleAtBatch, as_tree, tangents_of
from jacfunc._torch import is_pushing
from jacfunc._types import Leaves, Params, product_dtype


@dataclass(frozen=True, eq=False)
class GaussNewton(Generic[Params]):
    """``G = Σ_b J_bᵀ H_b J_b`` at a point, each of its forms computed when it is asked for.

    ``J_b`` is the Jacobian of sample b's outputs in the parameters, ``H_b`` the second derivative
    of the loss in these outputs. :func:`jacfunc.ggn` and :func:`jacfunc.fisher` make them. All
    answers are those of the point at which it was made: it keeps copies of parameters, buffers and
    the batch, modes and hooks, and what was evaluated, until it is dropped. With ``copy=False`` it
    keeps the tensors themselves, and refuses to answer once they have changed. Results are detached
    from the parameters; a product is differentiable by its vector, in reverse mode.

    Args:
        point: the module, its parameters and a batch.
        curvature_of: gives ``H`` at outputs of the module.

    Raises:
        ValueError: if tensors that the loss closes over, or with ``copy=False`` parameters,
            buffers, the batch, modes or hooks, have changed since.

    Example:
        A Laplace approximation of the last layer: the same matrix of some parameters alone.

        >>> import torch, jacfunc
        >>> from torch.nn import Linear, Sequential, Tanh
        >>> model = Sequential(Linear(3, 4), Tanh(), Linear(4, 2))
        >>> loss = torch.nn.functional.cross_entropy
        >>> x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
        >>> G = jacfunc.ggn(model, loss, select="2.*")(x, y)
        >>> precision = G.matrix() + torch.eye(10)
        >>> torch.allclose(G.matrix().diagonal()[:8], G.diagonal()["2.weight"].flatten())
        True
    """

    point: ModuleAtBatch
    curvature_of: Callable[[BatchOutputs], OutputCurvature] = field(repr=False)

    def product(self, vector: Params | Mapping[str, Tensor]) -> Params:
        """``G v``, by one product with J, one with H and one with Jᵀ; samples may be coupled.

        Args:
            vector: tensors like the parameters, by name; of a function in a tree like its own.

        Returns:
            The product, in the same form.

        Raises:
            TypeError, ValueError: names, shapes or dtypes that are not those of the parameters.
            NotImplementedError: what torch refuses, and inside forward mode; a backward pass that
                is not the transpose of what a tangent takes, by hooks or by a rule of its own.

        Cost:
            At first one evaluation of the batch, one with a tangent and one pullback; at the second
            product one more evaluation and pullback, both kept, and from then on two pullbacks
            each. The loss comes on top, and at each of the first two products a pullback that
            tells whether the products with J and Jᵀ are each other's transpose.

        Example:
            >>> import torch, jacfunc
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> G = jacfunc.ggn(model, torch.nn.functional.mse_loss)(torch.eye(2), torch.ones(2, 1))
            >>> G.product({"weight": torch.tensor([[1.0, 2.0]])})
            {'weight': tensor([[1., 2.]])}
        """
        params, api = self.point.params, self.point.api
        tangents = tangents_of(api, self.point.call.state, vector)
        if is_pushing():
            raise Refused(
                f"{api}: products must be differentiated in reverse mode, got one inside forward "
                "mode. The matrix is symmetric and constant: its product with a tangent is the "
                "derivative."
            )
        product = self._as_map() if is_followed(tangents) else self._times
        try:
            result = product(tangents)
        except Refused as refusal:
            if str(refusal).startswith(f"{api}: "):
                raise
            raise Refused(
                f"{api}: the product must be one that torch can take, got a refusal: {refusal}. "
                "Use diagonal(), blocks() or matrix(), which take the samples apart."
            ) from refusal
        return self._in_form(dict(zip(params, result, strict=True)))

    __matmul__ = product

    def diagonal(self) -> Params:
        """The exact diagonal, from the layers' inputs and cotangents; J is never written out.

        ``diag(G)[p] = Σ_b Σ_r (J_bᵀ S_b)[p, r]²`` with ``H_b = S_b S_bᵀ``. Samples must not be
        coupled.

        Returns:
            A tensor like each parameter, by name; of a function in a tree like its own.

        Raises:
            TypeError, ValueError: a module or a loss that couples samples, or a loss that is not
                convex in the outputs.

        Cost:
            One evaluation, M pullbacks of the loss and R ≤ M of the module for its M outputs a
            sample, at once, and for each layer the cheaper of two contractions; memory of all
            layers' inputs and R cotangents, and ``B · M²`` numbers. Torch's own cross entropy of
            classes, squared error and binary cross entropy of logits need no pullback of theirs.

        Example:
            >>> import torch, jacfunc
            >>> model = torch.nn.Linear(2, 1)
            >>> G = jacfunc.ggn(model, torch.nn.functional.mse_loss)(torch.eye(2), torch.ones(2, 1))
            >>> G.diagonal()
            {'weight': tensor([[1., 1.]]), 'bias': tensor([2.])}
        """
        params = self.point.params
        totals: dict[str, Tensor] = {}

        def add(_: torch.Size, parts: NamedParts) -> None:
            add_squares(totals, {name: (parts[name], params[name]) for name in parts})

        nbytes = sum(param.nbytes for param in params.values())
        added_up(self.point, self._sample_curvature, add, nbytes)
        zeros = {n: torch.zeros_like(p) for n, p in params.items() if n not in totals}
        return self._in_form(totals | zeros)

    def blocks(self) -> Params:
        """The exact diagonal blocks, one a parameter.

        Returns:
            Matrices ``[numel, numel]``, by name; of a function in a tree like its own.

        Raises:
            TypeError, ValueError: as :meth:`diagonal`.

        Cost:
            As :meth:`diagonal`, but each parameter's rows are written out, some samples at a
            time: ``2 · B · R · numel²`` operations.

        Example:
            >>> import torch, jacfunc
            >>> model = torch.nn.Linear(2, 1)
            >>> G = jacfunc.ggn(model, torch.nn.functional.mse_loss)(torch.eye(2), torch.ones(2, 1))
            >>> G.blocks()["weight"]
            tensor([[1., 0.],
                    [0., 1.]])
        """
        params = self.point.params
        named = params.items()
        totals = {name: p.new_zeros((p.numel(),) * 2, dtype=product_dtype(p)) for name, p in named}

        def add(_: torch.Size, parts: NamedParts) -> None:
            for name, param_parts in parts.items():
                for block in written(param_parts, params[name]):
                    flat = block.reshape(-1, params[name].numel())
                    totals[name].addmm_(flat.T, flat)

        nbytes = sum(total.nbytes for total in totals.values())
        added_up(self.point, self._sample_curvature, add, nbytes)
        return self._in_form({name: total.to(params[name].dtype) for name, total in totals.items()})

    def matrix(self) -> Tensor:
        """The whole matrix ``[N, N]``; :func:`jacfunc.param_slices` names a module's columns.

        Returns:
            One symmetric matrix of all chosen parameters.

        Raises:
            TypeError, ValueError: as :meth:`diagonal`.

        Cost:
            As :meth:`blocks` with all parameters as one; the rows of a chunk of samples are
            written out.

        Example:
            >>> import torch, jacfunc
            >>> model = torch.nn.Linear(2, 1)
            >>> G = jacfunc.ggn(model, torch.nn.functional.mse_loss)(torch.eye(2), torch.ones(2, 1))
            >>> G.matrix()
            tensor([[1., 0., 1.],
                    [0., 1., 1.],
                    [1., 1., 2.]])
        """
        params = self.point.params
        diagonal = torch.cat([param.new_zeros(param.numel()) for param in params.values()])
        total = torch.diag(diagonal.to(product_dtype(diagonal)))

        def add(lead: torch.Size, parts: NamedParts) -> None:
            blocks = [
                rows(parts.get(name, []), partial(param.new_zeros, (*lead, *param.shape)))
                for name, param in params.items()
            ]
            flat = torch.cat([block.reshape(lead.numel(), -1) for block in blocks], 1)
            total.addmm_(flat.T.to(total.dtype), flat.to(total.dtype))

        added_up(self.point, self._sample_curvature, add, total.nbytes)
        return total.to(diagonal.dtype)

    def _in_form(self, named: dict[str, Tensor]) -> Params:
        """What there is by name, in the form of the parameters."""
        result: Params = as_tree(self.point.call.state, named)
        return result

    def _times(self, tangents: Leaves) -> Leaves:
        """``G v = Jᵀ H J v``; zero where there are no samples, or no parameters."""
        if not (self.point.size and tangents):
            return tuple(map(torch.zeros_like, tangents))
        return self._products.pulled(self._batch_curvature.times(self._products.pushed(tangents)))

    def _as_map(self) -> LinearMap:
        """The product as a map differentiable by the vector; it is its own transpose."""
        return LinearMap(self._times, partial(one_by_one, self._times), self._as_map)

    @cached_property
    def _products(self) -> BatchProducts:
        """``J v`` and ``Jᵀ u`` of the batch."""
        return BatchProducts(self.point)

    @cached_property
    def _batch_curvature(self) -> OutputCurvature:
        """``H`` at the outputs of the module called with the batch."""
        return self.curvature_of(self._products.outputs)

    @cached_property
    def _sample_curvature(self) -> OutputCurvature:
        """``H`` at the outputs of the module called with each sample alone."""
        return self.curvature_of(self.point.outputs)
