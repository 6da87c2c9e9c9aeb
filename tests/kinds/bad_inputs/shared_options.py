"""Bad options that several doors for modules share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import jacfunc
from tests.kinds.bad_inputs import Bad

MODEL = nn.Linear(3, 2)
XS, TARGETS = torch.ones(4, 3), torch.ones(4, 2)


def module_jacobian(**options: Any) -> Any:
    return jacfunc.module_jacobian(MODEL, **options)(XS)


def per_sample(**options: Any) -> Any:
    return jacfunc.module_jacobian(MODEL, per_sample=True, **options)(XS)


DOORS: dict[str, Callable[..., Any]] = {
    "module_jacobian": per_sample,
    "stream_jacobian": lambda **o: list(
        jacfunc.stream_jacobian(MODEL, per_sample=True, **o)(XS),
    ),
    "ntk": lambda **o: jacfunc.ntk(MODEL, None, XS, **o),
    "ggn": lambda **o: jacfunc.ggn(MODEL, F.mse_loss, **o)(XS, TARGETS).diagonal(),
    "gradient_norms": lambda **o: jacfunc.gradient_norms(MODEL, F.mse_loss, **o)(XS, TARGETS),
    "random_projection": lambda **o: jacfunc.random_projection(MODEL, 2, **o)(XS),
    "fisher": lambda **o: jacfunc.fisher(MODEL, "gaussian", **o)(XS).diagonal(),
}
WITH_OUT: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "module_jacobian": (partial(module_jacobian, flat=True), (8, 8)),
    "ntk": (DOORS["ntk"], (4, 4, 2, 2)),
    "random_projection": (DOORS["random_projection"], (4, 2, 2)),
}
"""Doors that write into tensors, and the shape of their results."""

OPTIONS: dict[str, tuple[Any, type[Exception], str]] = {
    "randomness='x'": ({"randomness": "x"}, ValueError, "randomness must be"),
    "randomness=None": ({"randomness": None}, ValueError, "randomness must be"),
    "chunk_size=0": ({"chunk_size": 0}, ValueError, "chunk_size must be"),
    "chunk_size='2'": ({"chunk_size": "2"}, TypeError, "chunk_size must be"),
    "chunk_size=True": ({"chunk_size": True}, TypeError, "chunk_size must be"),
    "memory='x'": ({"memory": "x"}, ValueError, "memory must be"),
    "memory=1.5": ({"memory": 1.5}, TypeError, "memory must be"),
    "in_dims={}": ({"in_dims": {}}, ValueError, "in_dims must say something"),
    "in_dims=True": ({"in_dims": True}, TypeError, "in_dims must"),
    "in_dims='x'": ({"in_dims": "x"}, TypeError, "in_dims must"),
    "in_dims=('a',)": ({"in_dims": ("a",)}, TypeError, "in_dims must"),
    "in_dims=(0, 0)": ({"in_dims": (0, 0)}, ValueError, "in_dims must"),
    "in_dims of a name": ({"in_dims": {"nothing": 0}}, ValueError, "in_dims must"),
}


def _of_out() -> list[Bad]:
    rows = []
    for door, (call, shape) in WITH_OUT.items():
        zeros = torch.zeros(shape)
        for name, out, error, words in (
            ("integers", zeros.long(), TypeError, "out must be real and floating point"),
            ("booleans", zeros.bool(), TypeError, "out must be real and floating point"),
            ("complex", zeros.to(torch.complex64), TypeError, "out must be real"),
            ("an array", zeros.numpy(), TypeError, "out must be a"),
            ("without numbers", zeros.to("meta"), ValueError, "out must hold numbers"),
            ("expanded", zeros[:1].expand(shape), ValueError, "out must have a place for each"),
            ("sparse", zeros.to_sparse(), ValueError, "out must be dense"),
            ("with a graph", zeros.clone().requires_grad_(), ValueError, "out must be plain"),
            ("of another shape", torch.zeros(3, 3), ValueError, "out must have the shape"),
        ):
            rows.append(Bad(door, f"out: {name}", partial(call, out=out), error, words))
    return rows


def _of_form() -> list[Bad]:
    """``dtype=`` and ``device=``, and parts of the module for ``out=``."""
    rows = []
    for flat in (False, True):
        call = partial(per_sample, flat=flat)
        for dtype in (torch.int64, torch.bool, torch.complex64, "float32", float):
            words = "dtype must be real and floating point"
            bad = partial(call, dtype=dtype)
            rows.append(Bad("module_jacobian", f"dtype={dtype} {flat}", bad, TypeError, words))
        for device in ("nowhere", 1.5):
            bad = partial(call, device=device)
            words = "device must be one that"
            rows.append(Bad("module_jacobian", f"device={device!r} {flat}", bad, ValueError, words))
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("scale", torch.ones(1, 1))
    x = torch.ones(1, 1)
    for name, out in {
        "a parameter": model.weight.detach(),
        "a buffer": model.scale,
        "the input": x,
    }.items():
        calls = {
            "module_jacobian": jacfunc.module_jacobian(model, flat=True, out=out),
            "ntk": partial(jacfunc.ntk, model, None, out=out.view(1, 1, 1, 1)),
            "random_projection": jacfunc.random_projection(model, 1, out=out.view(1, 1, 1)),
        }
        words = "out must not be what the call reads"
        rows += [
            Bad(door, f"out: {name}", partial(call, x), ValueError, words)
            for door, call in calls.items()
        ]
    return rows


def _of_fisher() -> list[Bad]:
    fisher = DOORS["fisher"]
    options: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"generator": 0}, TypeError, "generator must be a torch.Generator"),
        ({"generator": "x"}, TypeError, "generator must be a torch.Generator"),
        ({"reduction": ""}, ValueError, "reduction must be 'mean' or 'sum'"),
        ({"reduction": 0}, ValueError, "reduction must be 'mean' or 'sum'"),
        ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum'"),
        ({"draws": 0}, ValueError, "draws must be a positive number"),
        ({"draws": 1.5}, ValueError, "draws must be a positive number"),
    ]
    return [
        Bad("fisher", str(bad), partial(fisher, **bad), error, words)
        for bad, error, words in options
    ]


def _of_outputs() -> list[Bad]:
    """``outputs=``, and what may be passed as such."""
    whole, several = torch.zeros(4, 1, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long)
    options: dict[str, tuple[Any, type[Exception], str]] = {
        "a word": ("x", TypeError, "outputs must be numbers, a slice"),
        "a number": (1, TypeError, "outputs must be numbers, a slice"),
        "nothing": ([], TypeError, "outputs must be numbers, a slice"),
        "True": ([True], TypeError, "outputs must be numbers, a slice"),
        "a class": (jacfunc.TopK, TypeError, "outputs must be numbers, a slice"),
        "a mask": (torch.ones(2).bool(), TypeError, "outputs must be numbers or cotangents"),
        "complex": (torch.ones(2) * 1j, TypeError, "outputs must be numbers or cotangents"),
        "no numbers": (whole[:, :0], ValueError, r"outputs must be numbers \[R\], or \[B, R\]"),
        "numbers in a cube": (whole[None], ValueError, r"outputs must be numbers \[R\]"),
        "no cotangents": (torch.ones(0, 2), ValueError, "outputs must be dense cotangents"),
        "a slice of words": (slice("a"), ValueError, "outputs must be a slice of whole numbers"),
        "a slice of no steps": (slice(0, 2, 0), ValueError, "outputs must be a slice of whole"),
        "an empty slice": (slice(2, 2), ValueError, "outputs must choose some of the 2 outputs"),
        "no such output": ([2], ValueError, "outputs must be numbers from -2 to 1, for 2 outputs"),
        "none so far back": ([-3], ValueError, "outputs must be numbers from -2 to 1"),
        "of other samples": (several, ValueError, r"outputs \[B, R\] must be for 4 samples"),
        "too many": (jacfunc.TopK(3), ValueError, "k of TopK must be at most the 2 outputs"),
        "no such dim": (jacfunc.Sampled(1, dim=1), ValueError, "dim of Sampled must be a dim"),
    }
    doors = {door: call for door, call in DOORS.items() if door not in ALL_ROWS}
    rows = [
        Bad(door, f"outputs: {name}", partial(call, outputs=outputs), error, words)
        for door, call in doors.items()
        for name, (outputs, error, words) in options.items()
    ]
    for kind in (jacfunc.TopK, jacfunc.Sampled):
        for k in (0, 1.5, True, "x"):
            words = "k must be a positive number of outputs"
            rows.append(Bad(kind.__name__, f"k={k}", partial(kind, k), ValueError, words))
        words, bad = "dim must be a dimension", partial(kind, 1, dim="x")
        rows.append(Bad(kind.__name__, "dim='x'", bad, TypeError, words))
    seed = partial(jacfunc.Sampled, 1, seed="x")  # type: ignore[arg-type]
    rows.append(Bad("Sampled", "seed='x'", seed, TypeError, "seed must be an int"))
    chances = partial(jacfunc.Sampled, 1, chances="x")  # type: ignore[arg-type]
    rows.append(Bad("Sampled", "chances='x'", chances, ValueError, "chances must be"))
    return rows


ALL_ROWS = {"gradient_norms", "random_projection"}
"""Doors that can't be asked for some outputs."""

ROWS = [
    *_of_fisher(),
    *_of_outputs(),
    *(
        Bad(door, name, partial(call, **options), error, words)
        for door, call in DOORS.items()
        for name, (options, error, words) in OPTIONS.items()
    ),
    *_of_out(),
    *_of_form(),
]
