"""The generalized Gauss-Newton matrix at a point: products, diagonal, blocks, or all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, overload

import torch
from torch import Tensor

from jacfunc._curvature.chosen import KnownLoss
from jacfunc._curvature.forms import CurvatureOf, MatrixProducts, SampleSums
from jacfunc._errors import Refused
from jacfunc._linear_map import is_followed
from jacfunc._lock import kept_property
from jacfunc._modules import ModuleAtBatch, as_tree, tangents_of
from jacfunc._torch import is_pushing
from jacfunc._types import Leaves, Params, Tree
from jacfunc.operators import LinearOperator, Space, SymmetricOperator


class GaussNewton(SymmetricOperator, Generic[Params]):
    """``G = Σ_b J_bᵀ H_b J_b`` at a point, each of its forms computed when it is asked for.

    ``J_b`` is the Jacobian of sample b's outputs in the parameters, ``H_b`` the second derivative
    of the loss in these outputs. :func:`jacfunc.ggn` and :func:`jacfunc.fisher` make them. All
    answers are those of the point at which it was made: it keeps copies of parameters, buffers and
    the batch, modes and hooks, and what was evaluated, until it is dropped. With ``copy=False`` it
    keeps the tensors themselves, and refuses to answer once they have changed. Results are detached
    from the parameters; a product is differentiable by its vector, in reverse mode.

    It is a :class:`jacfunc.operators.LinearOperator`, which is its own transpose: ``G @ v`` of a
    tree or a flat vector, ``G @ V`` of many, sums, restrictions, solvers of SciPy.

    Args:
        point: the module, its parameters and a batch.
        curvature_of: gives ``H`` at outputs of the module.
        loss: whose second derivative H is, where its kind is known.

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
        >>> torch.allclose(G @ torch.eye(10), G.matrix(), atol=1e-6)
        True
    """

    def __init__(
        self, point: ModuleAtBatch, curvature_of: CurvatureOf, loss: KnownLoss | None = None
    ) -> None:
        # not by the base: who multiplies by trees needs no spaces, which take a while
        self.api, self.point, self.curvature_of = point.call.api, point, curvature_of
        self._loss = loss

    @kept_property
    def domain(self) -> Space:
        return Space.of(as_tree(self.point.call.state, self.point.params))

    @property
    def codomain(self) -> Space:  # type: ignore[override]
        return self.domain

    def __repr__(self) -> str:
        return f"GaussNewton(point={self.point!r})"

    def product(self, vector: Params | Mapping[str, Tensor]) -> Params:
        """``G v``, by one product with J, one with H and one with Jᵀ; samples may be coupled.

        Args:
            vector: tensors like the parameters, by name; of a function in a tree like its own.

        Returns:
            The product, in the same form.

        Raises:
            TypeError, ValueError: names, shapes or dtypes that are not those of the parameters; a
                module that couples samples where it calls other operations than at first.
            NotImplementedError: what torch refuses, and inside forward mode; a backward pass that
                is not the transpose of what a tangent takes, by hooks or by a rule of its own.

        Cost:
            At first one evaluation with a tangent and one pullback (at the first point of a kind
            two evaluations); at the second product two more pullbacks, and from then on two each.
            Now and then one tells whether products with J and Jᵀ are each other's transpose. Of a
            loss of torch itself no graph is made: all holds less than five times the outputs. After
            some products of small modules a point takes one evaluation, and a product no pullback.

        Example:
            >>> import torch, jacfunc
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> G = jacfunc.ggn(model, torch.nn.functional.mse_loss)(torch.eye(2), torch.ones(2, 1))
            >>> G.product({"weight": torch.tensor([[1.0, 2.0]])})
            {'weight': tensor([[1., 2.]])}
        """
        tangents = tangents_of(self.api, self.point.call.state, vector)
        if self.point.size and not (is_pushing() or is_followed(tangents)):
            products = self._in_words(self._products.of_one, tangents)
        else:
            every = self.pushforward_batch(tuple([tangent[None] for tangent in tangents]))
            products = tuple([product[0] for product in every])
        return self._in_form(dict(zip(self.point.params, products, strict=True)))

    @overload
    def __matmul__(self, other: LinearOperator) -> LinearOperator: ...
    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: Params | Mapping[str, Tensor]) -> Params: ...
    def __matmul__(self, other: Any) -> Any:
        """The product with one vector or a matrix, or the composition with an operator."""
        is_tree = isinstance(other, dict) or not isinstance(other, Tensor | LinearOperator)
        return self.product(other) if is_tree else super().__matmul__(other)

    def mv(self, vector: Tree) -> Any:
        if isinstance(vector, Tensor) and vector.dim() == 1 and not self.domain.is_leaf(vector):
            return super().mv(vector)
        return self.product(vector)

    def pushforward_batch(self, tangents: Leaves) -> Leaves:
        if not (self.point.size and tangents and tangents[0].shape[0]):
            return tuple(map(torch.zeros_like, tangents))
        if is_pushing():
            raise Refused(
                f"{self.api}: products must be differentiated in reverse mode, got one inside "
                "forward mode. The matrix is symmetric and constant: its product with a tangent is "
                "the derivative."
            )
        take = self._products.as_map() if is_followed(tangents) else self._products.times
        return self._in_words(take, tangents)

    def _in_words(self, take: Callable[[Leaves], Leaves], tangents: Leaves) -> Leaves:
        """Products of tangents; a refusal says what else there is to take."""
        try:
            return take(tangents)
        except Refused as refusal:
            if str(refusal).startswith(f"{self.api}: "):
                raise
            raise Refused(
                f"{self.api}: the product must be one that torch can take, got a refusal: "
                f"{refusal}. Use diagonal(), blocks() or matrix(), which take the samples apart."
            ) from refusal

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
            After some calls of a kind the first answer, if it is this one, keeps nothing: the next
            one evaluates once more.

        Example:
            >>> import torch, jacfunc
            >>> model = torch.nn.Linear(2, 1)
            >>> G = jacfunc.ggn(model, torch.nn.functional.mse_loss)(torch.eye(2), torch.ones(2, 1))
            >>> G.diagonal()
            {'weight': tensor([[1., 1.]]), 'bias': tensor([2.])}
        """
        return self._in_form(self._sums.squares())

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
        return self._in_form(self._sums.blocks())

    def matrix(self, *, chunk_size: int | None = None) -> Tensor:
        """The whole matrix ``[N, N]``; :func:`jacfunc.param_slices` names a module's columns.

        Args:
            chunk_size: so many columns at once by products, which takes samples that are coupled,
                too. By default rows of samples are multiplied, as many at once as the options of
                the door say.

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
        if chunk_size is not None:
            return super().matrix(chunk_size=chunk_size)
        return self._sums.matrix()

    def _in_form(self, named: Mapping[str, Tensor]) -> Params:
        """What there is for each parameter, in the form in which parameters come."""
        result: Params = as_tree(self.point.call.state, named)
        return result

    @kept_property
    def _products(self) -> MatrixProducts:
        return MatrixProducts(self.point, self.curvature_of, self._loss)

    @kept_property
    def _sums(self) -> SampleSums:
        return SampleSums(self.point, self.curvature_of, self._loss)
