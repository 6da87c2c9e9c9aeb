"""Torch's compilers: its own code is run as it was written, and ours is traced, guarded, compiled.

What torch.compile has compiled runs as it was written where jacfunc calls it. Torch keeps compiled
code from call to call, and does not look at which transforms are active: code compiled for tangents
is run again for a plain graph, and returns wrong numbers.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from operator import attrgetter
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from jacfunc._torch.inductor import bare_operator, by_inductor, package_of, without_refused
from jacfunc._types import Leaves

ResultT = TypeVar("ResultT")


class _Depth(threading.local):
    """How many of jacfunc's evaluations this thread is inside of."""

    inside = 0
    recorded = 0
    """How many of these are recorded: inside them even torch.cond and its like are not compiled."""


class _Stance:
    """A stance of torch's compiler: eager in threads inside an evaluation, else the former stance.

    ``torch.compiler.set_stance`` is made for one thread: it turns the compiler off in all threads,
    and if two threads leave it in another order than they entered, it stays off.
    """

    def __init__(self, before: Any, depth: _Depth) -> None:
        self._before, self._depth = before, depth

    @property
    def stance(self) -> Any:
        """Read by torch whenever a compiled function is called."""
        depth = self._depth
        if depth.recorded or (depth.inside and not _is_control_flow(sys._getframe(2))):
            return "force_eager"
        return self._before.stance

    def __getattr__(self, name: str) -> Any:
        return getattr(self._before, name)


def _is_control_flow(caller: Any) -> bool:
    """Does torch.cond, or its like, run its function? It needs the graph of the compiled one."""
    frame = caller.f_back
    return frame is not None and frame.f_globals.get("__name__") == _CONTROL_FLOW


_CONTROL_FLOW = "torch._higher_order_ops.utils"


class _AsWritten:
    """A context in which compiled functions run as they were written, in this thread."""

    def __init__(self) -> None:
        self._compiler: Any = sys.modules["torch._dynamo.eval_frame"]
        self._depth = _Depth()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A context in which torch.cond and its like raise.

        If recorded, they would make their compiler fail in all later calls.
        """
        self._depth.recorded += 1
        try:
            yield
        finally:
            self._depth.recorded -= 1

    def __enter__(self) -> Self:
        self._depth.inside += 1
        # it is not taken back: another thread may be inside when this one leaves
        if type(self._compiler._stance) is not _Stance:
            self._compiler._stance = _Stance(self._compiler._stance, self._depth)
        return self

    def __exit__(self, *error: object) -> None:
        self._depth.inside -= 1


@cache
def _as_written() -> _AsWritten:
    """The only one of the process, as the compiler has one stance."""
    return _AsWritten()


def as_written() -> AbstractContextManager[Any]:
    """A context in which compiled functions run as they were written, in this thread.

    It does nothing while the compiler is not loaded: then nothing is compiled yet.
    """
    if "torch._dynamo.eval_frame" not in sys.modules or torch.compiler.is_compiling():
        return _NOTHING
    return _as_written()


_NOTHING = nullcontext()


def run_as_written(func: Callable[..., ResultT], *args: Any, **kwargs: Any) -> ResultT:
    """``func(*args, **kwargs)`` under :func:`as_written`, cheaply if the compiler is not loaded."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return func(*args, **kwargs)
    with as_written():
        return func(*args, **kwargs)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Act as :func:`as_written`, and reset a compiler that is first loaded inside and fails."""
    was_loaded = "torch._dynamo" in sys.modules
    try:
        with as_written() as written, nullcontext() if written is None else written.recorded():
            yield
    except BaseException:
        if not was_loaded and "torch._dynamo" in sys.modules:  # then it knows no other code
            torch.compiler.reset()
        raise


_DROPPING = "dropout_p", "dropout", "training", "train"
"""Arguments of operators that draw: where one of them is zero or false, nothing is drawn."""


class Graphs:
    """What torch's tracer and compilers make of functions, and torch's own words for graphs."""

    OPERATORS = (OpOverload, OpOverloadPacket, CustomOpDef)
    """Types of torch's operators, and of a user's."""

    LEAF: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
    num_nodes: Callable[[], int] = torch._C._autograd._get_sequence_nr
    """The type of nodes where graphs end at leaves; how many nodes were made in this thread."""

    version_of: Callable[[dict[str, Any]], int] = torch._C._dynamo.guards.dict_version
    """A number of a dict, another one after each write into it, by which compiled code knows it."""

    hooks_of: Callable[[Tensor], Any] = attrgetter("_backward_hooks")
    """Hooks that users have set on the gradient of a tensor, in a table; None if never one."""

    @staticmethod
    def is_operator(node: Node) -> bool:
        """Is it a call of one of torch's operators?"""
        return node.op == "call_function" and isinstance(node.target, OpOverload)

    @staticmethod
    def tags_of(node: Node) -> Collection[torch.Tag]:
        """What torch says of the operator that the node calls."""
        return node.target.tags if isinstance(node.target, OpOverload) else ()

    @staticmethod
    def draws(node: Node) -> bool:
        """Does it draw random numbers? Not where an argument says that it drops nothing."""
        if torch.Tag.nondeterministic_seeded not in Graphs.tags_of(node):
            return False
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        values = {a.name: a.default_value for a in schema} | node.kwargs
        values |= dict(zip([a.name for a in schema], node.args, strict=False))
        return all(values.get(name, True) for name in _DROPPING)

    @staticmethod
    def writes(node: Node) -> bool:
        """Is it a call of an operator that writes into its arguments?"""
        return isinstance(node.target, OpOverload) and node.target._schema.is_mutable

    @staticmethod
    def load_tracer() -> None:
        """Load torch's tracer, which then puts a variable into the environment of the process."""
        import_module("torch._inductor.compiler_bisector")

    @staticmethod
    def of(func: Callable[..., Leaves], leaves: Leaves) -> GraphModule:
        """The operations of ``func`` at these leaves, in a graph that takes them as inputs.

        Raises:
            RuntimeError: if the course of the function depends on numbers.
        """
        torch.clear_autocast_cache()  # it may hold copies of parameters that no trace has seen
        try:
            return without_refused(make_fx(func)(*leaves))
        finally:
            torch.clear_autocast_cache()

    @staticmethod
    def without_writes(graph: GraphModule, leaves: Leaves) -> GraphModule:
        """The graph without writes into its own tensors; those into its inputs are at its end."""

        def run(*inputs: Tensor) -> Any:  # a call of the module would run hooks of all modules
            return graph.forward(*inputs)

        with torch.no_grad():
            return make_fx(torch.func.functionalize(run, remove="mutations"))(*leaves)

    @staticmethod
    def guard_of_settings() -> Callable[[], bool]:
        """Tells whether torch's settings (gradients, autocast, dtype, threads) are those of now."""
        is_same: Callable[[], bool] = torch._C._dynamo.guards.GlobalStateGuard().check
        is_inference, now = torch.is_inference_mode_enabled, torch.get_autocast_dtype
        others = is_inference(), now("cpu"), now("cuda")  # which that does not look at
        return lambda: is_same() and (is_inference(), now("cpu"), now("cuda")) == others

    @staticmethod
    def guard_of_tensors(tensors: Leaves) -> Callable[..., bool]:
        """Tells whether tensors have types, shapes, strides, dtypes and devices of these."""
        guards: Any = torch._C._dynamo.guards
        sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
        dims = {"dynamic_dims_sizes": sizes, "dynamic_dims_strides": strides}
        return cast("Callable[..., bool]", guards.TensorGuards(*tensors, **dims).check)

    @staticmethod
    @contextmanager
    def untraced() -> Iterator[None]:
        """A context in which torch.compile, where it has broken its graph, traces no calls."""
        frames = torch._C._dynamo.eval_frame
        before = frames.set_eval_frame(None)
        try:
            yield
        finally:
            frames.set_eval_frame(before)

    tracer: Callable[[], object] = torch._C._dynamo.eval_frame.get_eval_frame_callback
    """Returns the hook of torch.compile that sees every call of Python's; None as a rule."""

    bare_operator = staticmethod(bare_operator)
    by_inductor = staticmethod(by_inductor)
    package_of = staticmethod(package_of)
