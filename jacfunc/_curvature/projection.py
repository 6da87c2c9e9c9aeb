"""Public function: random projections of every sample's Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Required, Unpack, overload

import torch
from torch import Tensor, nn

from jacfunc._assembly import Places, shared_units, stack
from jacfunc._curvature.loss import Loss, LossFunction
from jacfunc._curvature.signs import FlatSigns, SignsBySide, signs_of
from jacfunc._factored import FactoredJacobian, NamedParts
from jacfunc._lending import Select
from jacfunc._linear_map import LeafNumbers
from jacfunc._losses import check_loss, is_of_torch
from jacfunc._memory import DRAWN_BYTES, at_most
from jacfunc._modules import (
    Batching,
    BatchOptions,
    Independent,
    ModuleAtBatch,
    SampleOptions,
    as_tree,
)
from jacfunc._showing import named
from jacfunc._types import Leaves, Memory, Randomness, Tree, product_dtype

API = "random_projection"


class ProjectionOptions(SampleOptions, total=False):
    """What :func:`random_projection` takes by keyword."""

    seed: int
    out: Tree


class TwoSidedOptions(ProjectionOptions, total=False):
    """Options of a random projection that is made for each parameter alone, of two sides."""

    per_module: Required[tuple[int, int]]


@overload
def random_projection(
    module: nn.Module | Callable[..., Any],
    size: int,
    loss: None = None,
    **options: Unpack[ProjectionOptions],
) -> Callable[..., Tree]: ...
@overload
def random_projection(
    module: nn.Module | Callable[..., Any],
    size: int,
    loss: LossFunction,
    **options: Unpack[ProjectionOptions],
) -> Callable[..., Tensor]: ...
@overload
def random_projection(
    module: nn.Module | Callable[..., Any],
    size: None = None,
    loss: LossFunction | None = None,
    **options: Unpack[TwoSidedOptions],
) -> Callable[..., Tree]: ...


def random_projection(
    module: nn.Module | Callable[..., Any],
    size: int | None = None,
    loss: LossFunction | None = None,
    *,
    per_module: tuple[int, int] | None = None,
    seed: int = 0,
    select: Select = None,
    in_dims: Tree = 0,
    randomness: Randomness = "error",
    chunk_size: int | None = None,
    memory: Memory = None,
    out: Tree = None,
    independent: Independent = None,
) -> Callable[..., Any]:
    """Every sample's Jacobian times a fixed random matrix, which is never whole in memory.

    ``J_b R`` with ``R`` of random signs ``±1/√size``, so that ``E[(J_b R)(J_c R)ᵀ] = J_b J_cᵀ``
    (Johnson and Lindenstrauss 1984): the features of TRAK (Park et al. 2023). With ``per_module``
    each parameter ``[n, m]`` has an R of its own, ``R_rows ⊗ R_columns`` (Choe et al. 2024): inputs
    and cotangents of a layer are projected before they are multiplied. Seed, sizes and the names
    of the parameters fix R, whatever the batch, the device or the chunks.

    Args:
        module: any ``nn.Module``, or a function ``func(params, *inputs)`` of a tree of parameters,
            with the batch in front of its outputs.
        size: columns of R; None with ``per_module``.
        loss: ``loss(outputs, targets)`` of the batch, one number: its gradient, as far as each
            sample adds to it, is projected instead of the Jacobian.
        per_module: columns ``(r, c)`` of ``R_rows [n, r]`` and ``R_columns [m, c]``. All dimensions
            of a parameter but the first are its columns; a bias has a plain R of ``r · c`` columns.
            The norm of a layer's gradient that is one outer product is as exact as from
            ``r · c / (r + c)`` plain columns, 24 with ``(48, 48)``.
        seed: of R.
        select: parameters, as in :func:`jacfunc.ggn`.
        in_dims: where inputs have the batch, as in :func:`jacfunc.module_jacobian`.
        randomness: of the module along the batch, as in :func:`jacfunc.module_jacobian`.
        chunk_size: samples taken at once; None takes all.
        memory: bytes that a call may take, as a number or in words (``"2 GiB"``), with what it
            returns: as many samples are taken at once as fit, as in :func:`jacfunc.ggn`.
        out: the result of an earlier call, to be overwritten: a loop allocates memory once.
        independent: each sample is taken alone, as a batch of one; True skips, ``"always"``
            insists on looking whether others change it, as in :func:`jacfunc.module_jacobian`.

    Returns:
        A function of the module's own inputs, or of the function's, its parameters first. It
        returns ``[B, *out, size]`` for each output leaf; with a loss, which is also given the
        targets, last among the arguments by position, ``[B, size]``. With ``per_module`` each is a
        dict of one such tensor a parameter, by name, with ``r · c`` for ``size``; of a function a
        tree like its own.

    Raises:
        TypeError, ValueError: arguments that do not fit, a module or a loss that couples samples.
        NotImplementedError: inside a transform, and a module that torch can't differentiate.

    Cost:
        One evaluation, M pullbacks at once (two and one with a loss, in chunks), and at most
        ``2 · B · M · P · size`` operations; P · size random bits for every chunk of samples. A
        chunk's rows of one parameter are written out where that costs less. With ``per_module``,
        ``2 · B · T · (M · n · r + m · c + M · r · c)`` operations for a layer of T positions.

    Example:
        >>> import torch, jacfunc
        >>> model, x = torch.nn.Linear(20, 3), torch.ones(4, 20)
        >>> features = jacfunc.random_projection(model, 512, seed=1)(x)
        >>> features.shape
        torch.Size([4, 3, 512])
        >>> bool(features[0, 0] @ features[1, 0] / 21 - 1 < 0.3)  # of J Jᵀ, which is 21
        True
        >>> jacfunc.random_projection(model, per_module=(8, 16))(x)["weight"].shape
        torch.Size([4, 3, 128])
    """
    options = BatchOptions.read(
        *(API, module, select, Batching(in_dims, randomness), chunk_size, memory),
        *(independent, chunk_size),
        by_rows=loss is None,
    )
    if loss is not None:
        check_loss(API, loss)
    signs = signs_of(API, size, per_module, seed)

    def random_projection_of(*args: Tree, **kwargs: Any) -> Tree:
        places = Places.of(API, out)
        places.check_unread(module, args, kwargs)
        if loss is None:
            at_batch = options.at((args, kwargs))
            with at_batch.as_one():
                return Projections(at_batch, signs).of_jacobians(places)
        at_batch, targets = options.with_targets((args, kwargs), is_of_torch(loss))
        with at_batch.as_one():
            at_outputs = Loss(API, loss, targets, at_batch.outputs)
            at_outputs.check_samples(options.independence)
            gradient = at_batch.budget.keep(at_outputs.gradient)
            return Projections(at_batch, signs).of_gradients(gradient, places)

    return named("random_projection", module, random_projection_of)


@dataclass(frozen=True)
class Projections:
    """Projections of all samples of a batch, by random signs."""

    at_batch: ModuleAtBatch
    signs: FlatSigns | SignsBySide

    def of_jacobians(self, places: Places) -> Tree:
        """A tree like the outputs, of ``[B, *out, size]`` or of one such tensor a parameter."""

        def work(_: slice, jacobian: FactoredJacobian) -> Leaves:
            rows = []
            for number, leaf in enumerate(jacobian.sample_outputs):
                of = slice(number, number + 1)
                every = self._projected(jacobian, shared_units(jacobian.outputs[of]), of)
                rows += [row.reshape(len(row), *leaf.shape, row.shape[-1]) for row in every]
            return tuple(rows)

        def tree_of(rows: Sequence[Tensor]) -> Tree:
            step = 1 if isinstance(self.signs, FlatSigns) else len(self.at_batch.params)
            by_output = [rows[start : start + step] for start in range(0, len(rows), step)]
            return self.at_batch.last_call.output_tree(list(map(self._tree, by_output)))

        return self._stacked(work, places, tree_of)

    def of_gradients(self, gradient: Leaves, places: Places) -> Tree:
        """Projections ``[B, size]`` of gradients, which are given in the outputs."""

        def work(samples: slice, jacobian: FactoredJacobian) -> Leaves:
            cotangents = tuple(leaf[samples].unsqueeze(0) for leaf in gradient)
            return tuple(row.squeeze(1) for row in self._projected(jacobian, cotangents))

        return self._stacked(work, places, self._tree)

    def _tree(self, rows: Sequence[Tensor]) -> Tree:
        """What there is for one output: one tensor, or one for each parameter."""
        if isinstance(self.signs, FlatSigns):
            return rows[0]
        return as_tree(self.at_batch.call.state, dict(zip(self.at_batch.params, rows, strict=True)))

    def _stacked(
        self,
        work: Callable[[slice, FactoredJacobian], Leaves],
        places: Places,
        tree_of: Callable[[Sequence[Any]], Tree],
    ) -> Tree:
        into = places.into(tree_of)
        return places.placed(tree_of(stack(self.at_batch.pieces(work), self.at_batch.size, into)))

    def _projected(
        self, jacobian: FactoredJacobian, cotangents: Leaves, of: LeafNumbers | None = None
    ) -> Leaves:
        """Projections ``[B, K, size]`` of what cotangents ``[K, B, *out]`` pull back to."""
        at_batch = self.at_batch
        leaves = (*cotangents, *at_batch.params.values())
        dtype = reduce(torch.promote_types, [leaf.dtype for leaf in leaves])
        num_seeds, num_samples = cotangents[0].shape[:2]
        shape = (num_samples, num_seeds, self.signs.size)
        zeros = partial(cotangents[0].new_zeros, dtype=product_dtype(*leaves))

        def project(named: NamedParts) -> Leaves:
            return self.signs.projected(named, at_batch.params, zeros(shape), at_most(DRAWN_BYTES))

        rows = at_batch.contracted(jacobian, cotangents, project, of)
        return tuple(row.to(dtype) for row in rows)
