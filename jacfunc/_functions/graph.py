"""``graph_jacobian``: the Jacobian of tensors whose graph is there already, without a function."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal, TypedDict, TypeVar, Unpack, overload

import torch
from torch import Tensor

from jacfunc._assembly import numel, read_by, sink_for
from jacfunc._functions.graph_checks import batch_size, check_call, split_of
from jacfunc._functions.graph_rows import API, GraphRows
from jacfunc._linear_map import Paths
from jacfunc._planning import resolve
from jacfunc._samples import groups_of
from jacfunc._torch import noise_like, recording
from jacfunc._trees import Split
from jacfunc._types import Blocks, Memory, No, Tree
from jacfunc.strategies import Reverse, Strategy, in_words_of

TensorT = TypeVar("TensorT", bound=Tensor)


class GraphOptions(TypedDict, total=False):
    """Options of :func:`graph_jacobian`, by name."""

    per_sample: bool
    strategy: str | Strategy
    chunk_size: int | None
    memory: Memory
    dtype: torch.dtype | None
    device: torch.device | str | None
    out: Tree
    create_graph: bool
    retain_graph: bool | None
    independent: Literal[True] | None


@overload
def graph_jacobian(
    outputs: Tree, inputs: Tree, *, flat: Literal[True], **options: Unpack[GraphOptions]
) -> Tensor: ...
@overload
def graph_jacobian(
    outputs: Tensor, inputs: Tensor, *, flat: No = False, **options: Unpack[GraphOptions]
) -> Tensor: ...
@overload
def graph_jacobian(
    outputs: Tensor,
    inputs: dict[str, TensorT],
    *,
    flat: No = False,
    **options: Unpack[GraphOptions],
) -> dict[str, Tensor]: ...
@overload
def graph_jacobian(
    outputs: Tensor, inputs: list[TensorT], *, flat: No = False, **options: Unpack[GraphOptions]
) -> list[Tensor]: ...
@overload
def graph_jacobian(
    outputs: Tree, inputs: Tree, *, flat: bool = False, **options: Unpack[GraphOptions]
) -> Tree: ...
def graph_jacobian(
    outputs: Tree,
    inputs: Tree,
    *,
    per_sample: bool = False,
    flat: bool = False,
    strategy: str | Strategy = "auto",
    chunk_size: int | None = None,
    memory: Memory = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tree = None,
    create_graph: bool = False,
    retain_graph: bool | None = None,
    independent: Literal[True] | None = None,
) -> Tree:
    """Jacobian of tensors by those that they were computed from: pulls back through their graph.

    ``J[i, j] = ∂ outputs[i] / ∂ inputs[j]``, where the forward pass was made before, in a training
    loop, say. Nothing is evaluated again, and no ``.grad`` of an input is written.

    Args:
        outputs: a tree of tensors that require grad.
        inputs: a tree of tensors that require grad: parameters, or what was computed on the way.
        per_sample: outputs and inputs have the batch in front, and each sample's outputs are
            differentiated by its own inputs alone.
        flat: return one matrix ``[M, N]``, per sample ``[B, M, N]``, instead of trees of blocks.
        strategy: ``"auto"``, ``"reverse"``, ``"looped"``, ``Reverse(...)`` or ``Looped()``: what
            pulls cotangents back.
        chunk_size: rows swept at once, for a strategy given by name.
        memory: bytes that the call may take, its result among them, as a number or in words
            (``"2 GiB"``). Without it ``"auto"`` keeps to half of what is free.
        dtype: dtype of the result.
        device: device of the result.
        out: the result of an earlier call, to be overwritten.
        create_graph: make the result differentiable, where gradients are on; by default it is
            detached.
        retain_graph: keep the graph for later. By default it is freed, as
            ``torch.autograd.grad`` does, unless ``create_graph``.
        independent: with ``per_sample``, True if samples are known not to depend on each other. By
            default this is looked at: random cotangents of some samples must give zeros in all
            others, to the last bit. What the graph does not show, such as a detached mean over the
            batch, is a constant.

    Returns:
        The tree of the outputs, each leaf replaced by the tree of the inputs, each leaf of that by
        a block ``[*out, *in]``, or per sample ``[B, *out, *in]``. It is zero where no path leads
        from an output to an input, and None in place of a leaf that is not floating.

    Raises:
        TypeError, ValueError: arguments that do not fit; a graph that was freed, or whose tensors
            were written into since; inputs that are no leaves of autograd and that no path leads
            to, as another tensor was used in their place; per sample, parameters that samples
            share, or samples that depend on each other.
        NotImplementedError: complex tensors, and what torch refuses.

    Cost:
        M/K sweeps of K pullbacks, for M outputs and chunks of K, and one pullback to free the graph
        where the last row was not swept alone. Per sample M is that of one sample, and
        ``2 * log2(B)`` more rows show whether samples are independent. Hooks run at every sweep. A
        tensor between the two that retains its gradient needs ``"looped"``, which leaves there what
        autograd leaves.

    Example:
        Two losses of one network, each with its own gradient:

        >>> import torch, jacfunc
        >>> model = torch.nn.Linear(3, 1)
        >>> error = model(torch.ones(4, 3)) - 1
        >>> losses = [error.square().mean(), error.abs().mean()]
        >>> squared, absolute = jacfunc.graph_jacobian(losses, dict(model.named_parameters()))
        >>> {name: tuple(block.shape) for name, block in squared.items()}
        {'weight': (1, 3), 'bias': (1,)}

        Each sample's Jacobian of the outputs in hidden features:

        >>> hidden = torch.tanh(model(torch.ones(4, 3)))
        >>> jacfunc.graph_jacobian(hidden.sin(), hidden, per_sample=True).shape
        torch.Size([4, 1, 1])
    """
    retains = create_graph if retain_graph is None else retain_graph
    flags = {"per_sample": per_sample, "flat": flat, "create_graph": create_graph}
    check_call(independent, **flags, retain_graph=retains)
    chosen = resolve(API, strategy, chunk_size, memory)
    sink = sink_for(API, out, flat, dtype, device, partial(read_by, None, outputs, inputs))
    out_split, in_split = split_of("outputs", outputs), split_of("inputs", inputs)
    graph = _graph(out_split, in_split)

    def blocks() -> Blocks:
        if not per_sample:
            rows = replace(graph, create_graph=create_graph, frees=not retains)
            return rows.blocks(sink, rows.chunk(chosen))
        size = batch_size(out_split, in_split)
        with recording():
            sums = tuple([out.sum(0) for out in graph.outputs])
        rows = replace(graph, outputs=sums, create_graph=create_graph, frees=not retains)
        chunk = rows.chunk(chosen)
        if independent is not True:
            # the groups that it looks at may be more than there are rows to make room for
            within = chosen if memory is None else Reverse(chunk or max(1, numel(sums)))
            _check_independent(graph, within)
        return rows.sample_blocks(sink, chunk, size)

    finished = in_words_of(API, blocks, MUST, INSTEAD)
    if flat:
        return finished[0][0]
    tree = out_split.place([in_split.place(row) for row in finished])
    return sink.placed(tree) if sink.copies else tree


MUST = "the graph must be one that can be pulled back"
INSTEAD = " Differentiate the function itself, with jacfunc.jacobian(func)."


def _graph(outputs: Split, inputs: Split) -> GraphRows:
    """The graph between outputs and inputs.

    Raises:
        ValueError: if an input was computed, and no path leads to it; or if none leads to any.
    """
    paths = Paths.between(outputs.leaves, inputs.leaves)
    pairs = list(zip(inputs.leaves, paths.met, strict=True))
    for number, (leaf, is_met) in enumerate(pairs):
        if not (is_met or (leaf.is_leaf and any(paths.met))):
            raise ValueError(
                f"{API}: inputs must be the tensors that outputs were computed from, got "
                f"{inputs.paths('inputs')[number]}, to which no path leads from any output. It may "
                "be a view or copy of the one that was used, or written into since: pass that "
                "one; or leave it out, as the Jacobian by it is zero."
            )
    every = (*outputs.leaves, *inputs.leaves)
    retaining = tuple([leaf for leaf in every if leaf.retains_grad])
    return GraphRows(outputs.leaves, inputs.leaves, paths, retaining=retaining)


def _check_independent(graph: GraphRows, strategy: Strategy) -> None:
    """Refuse samples whose outputs lead to the inputs of others.

    Random cotangents of each of some groups of samples must give zeros in all others: for any two
    samples, one group has the first without the second. A nan is no such path, as it may come of a
    zero times the infinite derivative of a sample's own.
    """
    with recording():
        groups = groups_of(len(graph.outputs[0]))
        pairs = zip(graph.outputs, noise_like(graph.outputs), strict=True)
        noisy = [(out * noise).unsqueeze(1).flatten(1).sum(1) for out, noise in pairs]
        sums = tuple([groups.to(sample) @ sample for sample in noisy])
    of_groups, start = replace(graph, outputs=sums), 0
    for rows in of_groups.sweep(of_groups.chunk(strategy)):
        outside = ~groups[start : start + len(rows[0])]
        start = (start + len(rows[0])) % max(len(groups), 1)
        for row in rows:
            reached = ((row > 0) | (row < 0)).unsqueeze(2).flatten(2).any(2)
            if bool((reached & outside.to(row.device)).any()):
                raise ValueError(
                    f"{API}: per_sample needs samples that do not depend on each other, got "
                    "outputs that change with the inputs of other samples, as with batch "
                    "normalization in train mode, or with a parameter that all samples share. "
                    "Leave per_sample out, or take module_jacobian(model, per_sample=True) for "
                    "parameters."
                )
