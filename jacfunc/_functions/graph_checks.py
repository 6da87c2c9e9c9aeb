"""Checks of what :func:`jacfunc.graph_jacobian` is called with, before anything is pulled back."""

from __future__ import annotations

from jacfunc._arguments import check_flags
from jacfunc._functions.graph_rows import API
from jacfunc._torch import is_outermost
from jacfunc._trees import Split, without_settings
from jacfunc._types import Tree, is_tensor


def check_call(independent: object, **flags: object) -> None:
    """Refuse a call inside a transform, and options that are none."""
    check_flags(API, **flags)
    if not is_outermost():
        raise ValueError(
            f"{API}: it must be called outside of transforms, got a call inside vmap, a derivative "
            "or a compiler, where a tensor's graph can't be read. Use jacobian(func) there."
        )
    if independent is not None and independent is not True:
        raise ValueError(
            f"{API}: independent must be None or True, got {independent!r}. Pass True if you know "
            "that samples do not depend on each other."
        )


def split_of(name: str, tree: Tree) -> Split:
    """The differentiable leaves of a tree, all of which must require grad."""
    split = Split.of(tree)
    if split.constants or not split.leaves:
        for path, leaf in without_settings(tree, name).items():
            if not is_tensor(leaf):
                raise TypeError(
                    f"{API}: {name} must be a tree of tensors, got {type(leaf).__name__} at "
                    f"{path}. Leave it out, or write list(model.parameters()) for parameters."
                )
        if not split.leaves:
            kinds = ", ".join(sorted({str(leaf.dtype) for leaf in split.constants})) or "none"
            raise TypeError(
                f"{API}: {name} must hold at least one floating point tensor, got {kinds}. "
                "Integers and booleans have no derivative."
            )
    for number, leaf in enumerate(split.leaves):
        if leaf.is_complex():
            raise NotImplementedError(
                f"{API}: {name} must be real, got {leaf.dtype} at {split.paths(name)[number]}. "
                "Pass torch.view_as_real(...) of an output, and compute with "
                "torch.view_as_complex(...) of an input."
            )
        if not leaf.requires_grad:
            raise ValueError(
                f"{API}: {name} must require grad, got {split.paths(name)[number]}, which no graph "
                "leads to. Call requires_grad_() on inputs before the forward pass, make that with "
                "gradients on and without detach(), and leave constants out."
            )
    return split


def batch_size(outputs: Split, inputs: Split) -> int:
    """How many samples outputs and inputs have in front."""
    named = {"outputs": outputs, "inputs": inputs}
    shapes = {
        path: tuple(leaf.shape)
        for name, split in named.items()
        for path, leaf in zip(split.paths(name), split.leaves, strict=True)
    }
    size = next(iter(shapes.values()))[:1]
    for path, shape in shapes.items():
        if not size or shape[:1] != size:
            raise ValueError(
                f"{API}: per_sample needs outputs and inputs with the batch in front, got "
                f"{path} of shape {shape} beside {next(iter(shapes.values()))} of the first "
                "output. A graph does not tell the samples of a parameter apart: take "
                "module_jacobian(model, per_sample=True) for parameters."
            )
    return int(size[0])
