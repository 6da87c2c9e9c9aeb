"""A function's operations at one kind of call, as a graph that holds at every call of that kind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from jacfunc._errors import Nameless
from jacfunc._lock import alone
from jacfunc._torch import Graphs, RandomState
from jacfunc._types import Leaves

MOST_TRACES = 4
"""A function is traced at most so often, until two graphs in a row are equal."""

LEAVE_NUMBERS = "Write branches on numbers with torch.where, and leave numbers in tensors."
_MADE_INSIDE = frozenset({torch.ops.aten.lift_fresh_copy, torch.ops.aten.lift_fresh})
"""What turns a constant of the code into a tensor."""


def traced(func: Callable[..., Leaves], inputs: Leaves) -> GraphModule:
    """The graph of ``func``, which gets the inputs and may refer to some of them as well.

    It is traced until two graphs are equal, as a function that counts, draws or reads a clock gives
    another one each time.

    Raises:
        Nameless: if it has no graph that would hold at the next call.
        NotImplementedError: if torch can't trace it.
    """
    before = RandomState(inputs)
    with alone():
        graph = _graph(func, inputs)
        for _ in range(MOST_TRACES - 1):
            last, graph = graph, _graph(func, inputs)
            if _are_equal(last, graph):
                break
        else:
            raise Nameless(
                "func must do the same at every call, got one whose operations or numbers change "
                "from call to call. Pass what changes as an argument."
            )
    if before.has_changed() or any(map(Graphs.draws, graph.graph.nodes)):
        raise Nameless(
            "func must draw no random numbers, got one that does. Draw them outside, and pass "
            "them as arguments; call model.eval() against dropout."
        )
    if any(map(depends_on_numbers, graph.graph.nodes)):
        raise Nameless(
            "func must have outputs and steps whose shapes do not depend on numbers, got one that "
            "selects by a mask, or the like. Use torch.where."
        )
    with in_our_words():
        graph = _written(graph, inputs)
    graph.graph.eliminate_dead_code()  # forward mode computes shapes from zeros of its own
    graph.recompile()
    _check_constants(graph)
    return graph


def _graph(func: Callable[..., Leaves], inputs: Leaves) -> GraphModule:
    """One trace."""
    with in_our_words(), _NoReads() as watch:
        graph = Graphs.of(func, inputs)
        watch.check()
    return graph


@contextmanager
def in_our_words() -> Iterator[None]:
    """What torch can't trace, or rewrite what it has traced, is refused.

    Raises:
        NotImplementedError: if there is such a thing.
    """
    try:
        yield
    except Nameless:
        raise
    except Exception as error:  # torch's trace may fail by any
        told = str(error).strip().split("\n")[0].partition(" - erroring out")[0].rstrip(".")
        reads = "value out of a tracing tensor" in told or "numbers of a tensor" in told
        raise NotImplementedError(
            f"compile: func must be one that can be traced, got an error: {told}. "
            + (LEAVE_NUMBERS if reads else "Call the derivative as it is.")
        ) from error


_READS = frozenset({"numpy", "__array__", "tolist", "__dlpack__", "storage", "__deepcopy__"})
"""Methods by which numbers leave a tensor without an operation that a trace would see."""


class _NoReads(torch.overrides.TorchFunctionMode):
    """Raises where a function reads numbers past the trace, which would burn them in."""

    failed: Exception | None = None
    """An error about numbers; the user's function may have caught it, and gone another way."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS and not _caller().startswith("jacfunc."):
            raise RuntimeError(f"numbers of a tensor are read by {name}()")
        aside = name if name in _ASIDE else _ASIDE_BY_GETTER.get(func)
        if aside and not _caller(_OF_TENSORS).startswith(("torch.", "jacfunc.")):
            raise RuntimeError(f"what tells tensors of one kind apart is read by {aside}")
        try:
            result = func(*args, **(kwargs or {}))
        except _OF_NUMBERS as error:
            self.failed = error
            raise
        if result is None and func == _GRADIENT.__get__ and not _caller().startswith("jacfunc."):
            raise RuntimeError("numbers of a tensor are read by .grad, which is None")
        return result

    def check(self) -> None:
        """Refuse a function that has caught what was raised of numbers.

        Raises:
            RuntimeError: if it has.
        """
        if self.failed is not None:
            raise RuntimeError(f"numbers of a tensor decide what is raised: {self.failed}")


_ASIDE = frozenset({"data_ptr", "storage_offset", "is_set_to", "is_shared", "untyped_storage"})
_ASIDE_BY_GETTER = {
    vars(torch._C.TensorBase)[name].__get__: name for name in ("_version", "is_leaf", "grad_fn")
}
"""What differs between tensors of one kind and equal numbers, such as where they lie in memory."""

_GRADIENT: Any = Tensor.grad
_OF_NUMBERS: Any = (vars(torch.linalg)["LinAlgError"], IndexError)
"""What torch raises where numbers do not do: of a matrix that is singular, of an index."""


_BETWEEN = "torch.", "jacfunc._faults."
"""Modules whose code stands between a function and what it calls: torch's, and watches."""
_OF_TENSORS = "torch._tensor.", "torch.overrides.", "jacfunc._faults."
"""Modules of methods of tensors that are written in Python, by which a function reads a tensor.

Other code of torch may read one on its own account."""


def _caller(between: tuple[str, ...] = _BETWEEN) -> str:
    """The module whose code called what a watch sees, past all that stands between."""
    frame: Any = sys._getframe(2)
    while True:
        name = f"{frame.f_globals.get('__name__')}."
        is_between = frame.f_code.co_name == "__torch_function__" or name.startswith(between)
        if not is_between:
            return name
        frame = frame.f_back


def depends_on_numbers(node: Node) -> bool:
    """Has it a shape that depends on numbers, as what a mask selects?"""
    if torch.Tag.dynamic_output_shape not in Graphs.tags_of(node):
        return False
    indices = node.args[1] if node.target is torch.ops.aten.index.Tensor else None
    if indices is None:
        return True
    kinds = [n.meta["val"].dtype for n in node.all_input_nodes[1:] if "val" in n.meta]
    return (
        bool({torch.bool, torch.uint8} & set(kinds)) or len(kinds) < len(node.all_input_nodes) - 1
    )


def _are_equal(one: GraphModule, other: GraphModule) -> bool:
    """Do two graphs have the same operations and numbers?"""
    return one.code == other.code and all(
        map(torch.equal, _constants(one).values(), _constants(other).values())
    )


def _constants(graph: GraphModule) -> dict[str, Tensor]:
    """Tensors in the graph that are no inputs, by name."""
    nodes = [node for node in graph.graph.nodes if node.op == "get_attr"]
    values = {str(node.target): getattr(graph, str(node.target)) for node in nodes}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _check_constants(graph: GraphModule) -> None:
    """Refuse tensors that the function has from where nobody looks: they may be others next time.

    Raises:
        Nameless: if there is one.
    """
    for node in graph.graph.nodes:
        if node.op == "get_attr" and isinstance(value := getattr(graph, str(node.target)), Tensor):
            users = [getattr(user.target, "overloadpacket", None) for user in node.users]
            if not _MADE_INSIDE.issuperset(users):
                raise Nameless(
                    "func must have all tensors from its arguments, closures, globals and "
                    f"attributes, got one of shape {tuple(value.shape)} from elsewhere. Pass it as "
                    "an argument."
                )


def _written(graph: GraphModule, inputs: Leaves) -> GraphModule:
    """The graph without writes.

    Raises:
        Nameless: if it writes into its inputs.
    """
    if not any(map(Graphs.writes, graph.graph.nodes)):
        return graph
    graph = Graphs.without_writes(graph, inputs)
    for node in graph.graph.nodes:
        if Graphs.writes(node):
            raise Nameless(
                "func must write into no argument and nothing that it refers to, got a write "
                f"({node.target}). Write into copies; call model.eval() against running statistics."
            )
    return graph
