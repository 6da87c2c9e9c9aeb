"""What runs a graph: torch's operators one by one, Inductor, a package, a CUDA graph."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule

from jacfunc._errors import Nameless
from jacfunc._torch import Graphs
from jacfunc._traces.methods import by_methods
from jacfunc._types import Leaves

Backend: TypeAlias = Literal["inductor", "replay", "aot", "cudagraphs"]
"""How a trace is run."""

Run: TypeAlias = Callable[..., Any]
"""Takes the inputs of a graph, returns its outputs."""


@dataclass(frozen=True)
class Compiler:
    """Makes something that runs of a graph.

    Args:
        backend: how.
        directory: where packages are kept; they are found there by later processes.
    """

    backend: str
    directory: Path | None = None

    @classmethod
    def of(cls, api: str, backend: object, directory: Any) -> Self:
        """The compiler of this name.

        Raises:
            ValueError, TypeError: if there is none, or it does not go with the directory.
        """
        if not isinstance(backend, str) or backend not in _BACKENDS:
            names = ", ".join(map(repr, _BACKENDS))
            raise ValueError(
                f"{api}: backend must be one of {names}, got {backend!r}. 'inductor' is the "
                "fastest on a CPU, 'replay' is there at once."
            )
        if directory is not None and not isinstance(directory, str | PathLike):
            raise TypeError(
                f"{api}: directory must be a path, got {type(directory).__name__}. Write "
                "directory='compiled'."
            )
        if (directory is None) == (backend == "aot"):
            raise ValueError(
                f"{api}: directory must come with backend='aot', and it alone, got {directory!r} "
                f"with {backend!r}. It is where compiled code is kept for other processes."
            )
        return cls(backend, None if directory is None else Path(directory))

    def __call__(self, graph: GraphModule, inputs: Leaves, num_args: int) -> Run:
        """What runs the graph at inputs like these, of which the first are arguments."""
        return _BACKENDS[self.backend](self, graph, inputs, num_args)

    def replayed(self, graph: GraphModule, inputs: Leaves, num_args: int) -> Run:
        """The operators one by one, without what torch does around a call of a module."""
        run: Run = by_methods(graph).forward
        return run

    def compiled(self, graph: GraphModule, inputs: Leaves, num_args: int) -> Run:
        """The graph as code of Inductor's."""
        return Graphs.by_inductor(graph, inputs)

    def packaged(self, graph: GraphModule, inputs: Leaves, num_args: int) -> Run:
        """The graph as a file, named by what it computes; what lies there is not built again."""
        assert self.directory is not None
        self.directory.mkdir(parents=True, exist_ok=True)
        kinds = [(x.shape, x.stride(), x.dtype, x.device) for x in inputs]
        what = f"{graph.code}\n{kinds}\n{torch.__version__}"
        name = hashlib.sha256(what.encode()).hexdigest()[:20]
        return Graphs.package_of(graph, inputs, str(self.directory / f"{name}.pt2"))

    def captured(self, graph: GraphModule, inputs: Leaves, num_args: int) -> Run:
        """The launches of all operators as one CUDA graph."""
        if not all(x.is_cuda for x in inputs):
            raise Nameless(
                "backend='cudagraphs' needs tensors on CUDA, got others. Move them there, or pass "
                "backend='inductor'."
            )
        return CudaGraph(graph, num_args, inputs)


_BACKENDS: Mapping[str, Callable[[Compiler, GraphModule, Leaves, int], Run]] = MappingProxyType(
    {
        "inductor": Compiler.compiled,
        "replay": Compiler.replayed,
        "aot": Compiler.packaged,
        "cudagraphs": Compiler.captured,
    }
)


class CudaGraph:
    """A CUDA graph, with copies of arguments, from which it reads.

    All other inputs are read where they lay at the capture, as parameters stay in place: if one
    has moved, the graph is captured anew.

    Args:
        graph: what is captured.
        num_args: so many inputs are arguments.
        inputs: at which it is captured.
    """

    def __init__(self, graph: GraphModule, num_args: int, inputs: Leaves) -> None:
        self._graph, self._num_args, self._lock = graph, num_args, Lock()
        self._capture(inputs)

    def __call__(self, *inputs: Tensor) -> Leaves:
        """The outputs, copied: the next call overwrites its own."""
        with self._lock:
            args, others = inputs[: self._num_args], inputs[self._num_args :]
            if [x.data_ptr() for x in others] != self._addresses:
                self._capture(tuple([x.detach() for x in inputs]))
            elif args:
                torch._foreach_copy_(self._args, args)
            self._captured.replay()
            return tuple([out.clone() for out in self._outputs])

    def _capture(self, inputs: Leaves) -> None:
        others = inputs[self._num_args :]
        self._args = [x.clone() for x in inputs[: self._num_args]]
        self._addresses = [x.data_ptr() for x in others]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose their algorithms at first calls
                self._graph.forward(*self._args, *others)
        torch.cuda.current_stream().wait_stream(side)
        self._captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._captured):
            self._outputs: Leaves = self._graph.forward(*self._args, *others)
