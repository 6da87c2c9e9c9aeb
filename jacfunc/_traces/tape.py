"""The operations of a piece of jacfunc's own work, written down while it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from operator import getitem
from types import FrameType
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from jacfunc._errors import Nameless
from jacfunc._memory import DispatchMode, Unallocated
from jacfunc._torch import Graphs
from jacfunc._traces.detours import Place, in_memory, place_of, without_ones
from jacfunc._traces.steps import NOTEBOOK, Made, Step, kinds_of
from jacfunc._traces.traced import depends_on_numbers
from jacfunc._types import Leaves

_OURS = "jacfunc.", "torch."
_RUNS_AGAIN = "torch.utils.checkpoint"
"""The module of torch that calls a user's function again, in a backward pass."""

_ATEN = torch.ops.aten
_TENSORS = Tensor, type(None)
_BY_ADDRESS = frozenset({_ATEN.as_strided.default, _ATEN.as_strided_.default})
"""Operators that read memory beside that of the tensor that they are given."""


def written_down(
    work: Callable[[], Leaves], sources: Leaves, owners: Sequence[Any] = ()
) -> GraphModule:
    """The operations of ``work``, which is done once, as a graph of the ``sources``.

    The graph holds wherever the sources are of the same kind and lie in memory in the same way, as
    long as the work chooses what it does by nothing else. Unlike a trace it sees the work as it
    runs, with tensors that autograd has kept. What the work makes is freed as it would be else.

    Args:
        sources: all tensors that the work gets from outside.
        owners: of steps with code of a user's, which the graph takes after the sources.

    Raises:
        Nameless: if code that is neither jacfunc's nor torch's runs in the work, or if it gets
            other tensors, reads numbers, or draws some.
    """
    tape = _Tape(sources, owners, f"{work.__module__}.")
    if owners and (torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu")):
        raise Nameless("code of a user's would run in another mode")
    around = NOTEBOOK.set(tape)
    try:
        with tape:
            results = work()
    finally:
        NOTEBOOK.reset(around)
    if tape.failure is not None:  # the work may have caught it, and gone another way
        raise Nameless(tape.failure)
    tape.graph.output(tuple(map(tape.node_of, results)))
    tape.forget_what_nobody_reads()
    return GraphModule(torch.nn.Module(), tape.graph)


class _Memory(NamedTuple):
    """A tensor's memory while it lives: once that is freed, others may lie at its address.

    Args:
        storage: tells whether it lives.
        nodes: that stand for tensors in it, by what tells these from each other.
        every: all of them in order, those of tensors that were written into since, too.
    """

    storage: ref[torch.UntypedStorage]
    nodes: dict[Place, Node]
    every: list[Node]


class _Tape(DispatchMode):
    """Writes operators down as nodes, and knows tensors by where they lie in memory."""

    def __init__(self, sources: Leaves, owners: Sequence[Any], own_module: str) -> None:
        super().__init__()
        self._trusted = own_module, *_OURS
        self.graph = Graph()
        self._by_memory: dict[int, _Memory] = {}
        self._written: dict[Node, list[Node]] = {}
        """For each operator that writes, all nodes in the memory that it writes into."""
        self.failure: str | None = None  # an error would keep all frames that it came through
        self._sources: list[tuple[Tensor, Node]] = []
        for number, source in enumerate(sources):
            node = self.graph.placeholder(f"source_{number}")
            self._sources.append((source, node))
            self._note(node, source)
        self._owners = [(x, self.graph.placeholder(f"owner_{n}")) for n, x in enumerate(owners)]
        self._is_paused = False

    def with_step(self, step: Step, owner: Any, how: tuple[bool, ...], given: Leaves) -> Made:
        """What a step makes, which is written down as one operation."""
        known = [node for other, node in self._owners if other is owner]
        if not known or not all(x.is_cpu for x in given):
            self.failure = "code of a user's runs in it"
            raise Nameless(self.failure)
        taken = map(self.node_of, given)
        self._is_paused = True
        try:
            made = step(owner, how, None, *given)
        finally:
            self._is_paused = False
        node = self.graph.call_function(step, (*known, how, kinds_of(made), *taken))
        for number, tensor in enumerate(made):
            if tensor is not None:
                self._note(self.graph.call_function(getitem, (node, number)), tensor)
        return made

    def node_of(self, value: Any) -> Any:
        """The node that stands for a tensor; anything else as it is.

        Raises:
            Nameless: if it is a tensor that is neither a source nor made of these.
        """
        if not isinstance(value, Tensor):
            return value
        if not value.numel():  # where it comes from makes no difference
            kind: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
            return self.graph.call_function(_ATEN.empty.memory_format, ([*value.shape],), kind)
        node = self._memory_of(value).nodes.get(place_of(value)) or self._reshaped(value)
        if node is None:
            raise Nameless(f"a tensor of shape {tuple(value.shape)} comes from elsewhere")
        return node

    def _reshaped(self, value: Tensor) -> Node | None:
        """The entries of a source in the shape of a view that was made of it before the work."""
        (address, *_, kind), count = place_of(value), value.numel()
        dims = in_memory(value)
        for source, node in self._sources:
            there, *_, its_kind = place_of(source)
            if (there, its_kind, source.numel()) != (address, kind, count):
                continue
            steps: tuple[tuple[Any, Sequence[int]], ...] = ()
            if without_ones(source) == without_ones(value):  # there may be gaps
                steps = ((_ATEN.view.default, [*value.shape]),)
            elif dims is not None and (its_dims := in_memory(source)) is not None:
                steps = (
                    (_ATEN.permute.default, its_dims),
                    (_ATEN.view.default, [value.shape[dim] for dim in dims]),
                    (_ATEN.permute.default, sorted(range(len(dims)), key=dims.__getitem__)),
                )
            if steps:
                tensor = source.detach()
                for func, argument in steps:
                    tensor = func(tensor, argument)
                    node = self.graph.call_function(func, (node, argument))
                    node.meta["val"] = Unallocated(tensor)
                self._note(node, value)
                return node
        return None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._is_paused:
            return func(*args, **kwargs or {})
        try:
            return self._called(func, args, kwargs or {})
        except Nameless as error:
            self.failure = str(error)
            raise

    def _called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an operator, which is written down."""
        self._check_frames(sys._getframe(2))
        taken: Any = map_aggregate((args, kwargs), self.node_of)
        result = func(*args, **kwargs)
        if func is _ATEN.promote_types.default:  # it reads dtypes, and no numbers
            return result
        node = self.graph.call_function(func, *taken)
        if func in _BY_ADDRESS or Graphs.draws(node) or depends_on_numbers(node):
            raise Nameless(f"{func} is called, which does not do the same each time")
        if isinstance(result, Tensor):
            self._note(node, result)
        elif isinstance(result, tuple | list) and all(isinstance(x, _TENSORS) for x in result):
            for number, item in enumerate(result):
                if item is not None:
                    self._note(self.graph.call_function(getitem, (node, number)), item)
        else:
            raise Nameless(f"{func} returns what is no tensor")
        if Graphs.writes(node):
            self._note_write(node, args, kwargs)
        return result

    def _check_frames(self, frame: FrameType | None) -> None:
        """Refuse code of a user's that runs in the work: a hook, a backward pass, a checkpoint.

        Raises:
            Nameless: if there is some.
        """
        while frame is not None and frame.f_code is not written_down.__code__:
            name = f"{frame.f_globals.get('__name__')}."
            is_neutral = name.partition(".")[0] in sys.stdlib_module_names
            is_ours = is_neutral or name.startswith(self._trusted)
            if not is_ours or name.startswith(_RUNS_AGAIN):
                raise Nameless(f"code of {name[:-1]} runs in it")
            frame = frame.f_back

    def _note(self, node: Node, tensor: Tensor) -> None:
        node.meta["val"] = Unallocated(tensor)
        memory = self._memory_of(tensor)
        memory.nodes[place_of(tensor)] = node
        memory.every.append(node)

    def _memory_of(self, tensor: Tensor) -> _Memory:
        """What is known of the memory of a tensor that lives."""
        storage = tensor.untyped_storage()
        memory = self._by_memory.get(address := storage.data_ptr())
        if memory is None or memory.storage() is None:
            memory = self._by_memory[address] = _Memory(ref(storage), {}, [])
        return memory

    def _note_write(self, node: Node, args: Any, kwargs: Any) -> None:
        """Mark all that shares memory with what an operator writes into."""
        for number, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            tensor = args[number] if number < len(args) else kwargs[argument.name]
            in_memory = self._memory_of(tensor).every
            self._written.setdefault(node, []).extend(in_memory)
            for sharing in in_memory:
                sharing.meta["is_written"] = True
                if sharing.op == "placeholder":
                    raise Nameless(f"{node.target} writes into what comes from outside")

    def forget_what_nobody_reads(self) -> None:
        """Leave out operators whose results go nowhere, and writes into what is read no more.

        Torch's second derivatives compute more than was asked for, and add it up in place.
        """
        numbers = {node: number for number, node in enumerate(self.graph.nodes)}
        for node in reversed(self.graph.nodes):
            written = self._written.get(node)
            is_kept = node.is_impure() if written is None else False
            if node.users or is_kept:
                continue
            readers = [user for sharing in written or () for user in sharing.users]
            if all(numbers[reader] <= numbers[node] for reader in readers):
                self.graph.erase_node(node)
