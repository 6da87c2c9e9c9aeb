"""Records, while a function runs, which operations use a parameter, and by which rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jacfunc._errors import Refused, UnseenWrite
from jacfunc._factored.derived import Derived, parameters_of, replaced, through_graph
from jacfunc._factored.use import (
    METADATA,
    MOVING,
    RAW_MEMORY,
    READING,
    UNSEEN_WRITE,
    VIEWS,
    Path,
    TrackedParameter,
    UnruledUse,
    Use,
    UsedPart,
    View,
    is_part,
)
from jacfunc._faults import FREEZING, TAKES_DERIVATIVES
from jacfunc._layouts import OUT, Key, NoLayout, Placing, Trace, begins, ends
from jacfunc._linear_map import Anchor, Graph, differentiable_alias, no_view, nodes_of_call
from jacfunc._torch import below_transforms, innermost, untracked
from jacfunc.layers import FormOf, Rule, table

Args: TypeAlias = tuple[Any, ...]

_PLAIN = frozenset({bool, int, float, str})

MOST_PARTS = 32
"""A parameter that is split into more parts than this is faster without factors."""


class UseRecorder(TorchFunctionMode):
    """A context that records every operation with a rule that is called with a tracked parameter.

    Parameters are known by identity, so a function must call operations with them as they are, or
    with views of them. The recorded operation gets a twin of the parameter instead: a path in the
    graph to the parameter itself then shows a use that no rule has seen.

    Args:
        placing: says where tensors hold the samples.
        starts: nodes at which the walk through the graph ends, with the numbers of the parameters.
            Those of results that all samples share are added.
        grad_mode: may the Jacobian be differentiated further?
        trace: is told of all operations, if there is one.
        lent: numbers of the parameters that are no copies, which must not be written into.
        unruled: is told which parameters operations without a rule get.
    """

    def __init__(
        self,
        placing: Placing,
        lent: Set[int],
        unruled: UnruledUse,
        starts: dict[Any, int],
        grad_mode: bool,
        trace: Trace | None = None,
    ) -> None:
        super().__init__()
        self._placing, self._trace, self._grad_mode = placing, trace, grad_mode
        self._lent, self._unruled, self._starts = lent, unruled, starts
        self.uses: list[Use] = []
        self._inputs: list[tuple[Tensor, int]] = []
        """Inputs of recorded operations, and the versions that they had then."""
        self._operations: list[Any] = []
        placing.operations = self._operations
        self._is_over = False
        self.reads_values = False
        """Did Python read numbers?"""
        self.moves_samples = False
        """Has the function moved numbers to where other numbers say?"""
        self.derived: dict[int, Derived] = {}
        """Results that all samples share, by the numbers that they have among parameters."""
        self._count = 1 + max(starts.values(), default=0)
        self._tracked: dict[int, TrackedParameter] = {}
        self._level = innermost()
        self._rules, self._openings = table().rules, table().openings

    def finish(self) -> None:
        """Check the record once the function has run.

        Raises:
            Refused: if an input of an operation was written into later, as autograd refuses it.
            UnseenWrite: if a parameter that is no copy was written into, unseen.
        """
        with untracked():
            if any(x._version != version for x, version in self._inputs):
                raise Refused("what went into a layer was written into after it")
            written = {t.number for t in self._tracked.values() if _is_written(t)}
        if written & self._lent:
            raise UnseenWrite(UNSEEN_WRITE)
        unruled = self._unruled
        for numbers, more in ((unruled.written, written), (unruled.numbers, written)):
            params = self.parameters(numbers | more)
            numbers.clear()
            numbers.update(params)

    @property
    def signature(self) -> int:
        """Equal for evaluations that called the same functions with the same numbers and words."""
        return hash(tuple(self._operations))

    def track(self, number: int, handle: Tensor, twin: Tensor, path: Path = ()) -> None:
        """Track a tensor that is parameter ``number``, or the view of it that the path makes."""
        memory = below_transforms(handle)
        tracked = TrackedParameter(number, handle, twin, path, memory, memory._version)
        self._tracked[id(handle)] = tracked

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Args = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is begins:
            self._operations.clear()
        if func is begins or func is ends:
            self._is_over = func is ends
            return None
        kwargs = kwargs or {}
        if self._is_over:
            return func(*args, **kwargs)
        number = len(self._operations)
        self._operations.append(func)
        self._operations += [x for x in (*args, *kwargs.values()) if type(x) in _PLAIN]
        if self._trace is None:
            return self._called(number, func, args, kwargs)
        self._trace.calls[number] = func, args, kwargs
        result = self._trace.results[number] = self._called(number, func, args, kwargs)
        return result

    def _called(
        self, number: int, func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]
    ) -> Any:
        # called for every operation: as short as it can be
        if func in MOVING or _is_chosen_by_tensor(func, args):
            self.moves_samples = True
        elif func in READING:
            self.reads_values = True
        if func in TAKES_DERIVATIVES and self._is_at_own_level():
            raise Refused("the function takes a derivative itself, of what may stand for others")
        tracks = bool(self._tracked)
        has_parameter = tracks and (self._has_tracked(args) or self._has_tracked(kwargs.values()))
        is_used = has_parameter and self._is_at_own_level()
        if func in self._openings and (is_used or self._is_under_vmap()):
            with self:
                return self._openings[func](*args, **kwargs)
        if not has_parameter:
            return func(*args, **kwargs)
        if is_used and func in VIEWS:
            return self._view(number, func, args, kwargs)
        if is_used and func in self._rules:
            return self._use(number, self._rules[func], func, args, kwargs)
        if func is Tensor.register_hook:
            raise Refused("a parameter has a hook, which layers' factors pass by")
        if func in FREEZING:
            self._note_unruled(args, may_write_unseen=True)
            self._tracked.pop(id(args[0]), None)  # it may be a constant from here on
            return func(*args, **kwargs)
        if is_used and func not in METADATA and func not in RAW_MEMORY:
            return self._derive(number, func, args, kwargs)
        if func not in METADATA:
            self._note_unruled((*args, *kwargs.values()), func in RAW_MEMORY)
        return func(*args, **kwargs)

    def _has_tracked(self, values: Iterable[Any]) -> bool:
        """Is a tracked tensor among the arguments, or in lists of them?"""
        for value in values:
            if id(value) in self._tracked:
                return True
            if isinstance(value, tuple | list) and self._has_tracked(value):
                return True
        return False

    def _note_unruled(self, values: Iterable[Any], may_write_unseen: bool = False) -> None:
        """Note the parameters among the arguments of an operation without a rule.

        Nothing tells whether the operation writes into them.
        """
        for value in values:
            if tracked := self._tracked.get(id(value)):
                is_lent = tracked.number in self._lent
                if is_lent and _is_written(tracked):
                    raise UnseenWrite(UNSEEN_WRITE)
                self._unruled.numbers.add(tracked.number)
                if is_lent:
                    raise Refused("a parameter that is no copy may be written into")
                if may_write_unseen:
                    self._unruled.written.add(tracked.number)
            elif isinstance(value, tuple | list):
                self._note_unruled(value, may_write_unseen)

    def _is_at_own_level(self) -> bool:
        """Is the operation differentiated, and inside no further transform?"""
        return torch.is_grad_enabled() and innermost() == self._level

    def _is_under_vmap(self) -> bool:
        """Is the operation under our vmap? Then torch's fused layers must be opened anyway."""
        return self._level is not None and innermost() == self._level

    def _find(self, value: Any) -> TrackedParameter | None:
        """The tracked parameter that a value is, if nothing has written into it."""
        tracked = self._tracked.get(id(value))
        if tracked is None or _is_written(tracked) or tracked.number in self._unruled.written:
            return None
        return tracked

    def _view(
        self, number: int, func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]
    ) -> Any:
        """Call a function that makes views of a parameter, and track the views, too."""
        whole, result = self._find(args[0]) if args else None, func(*args, **kwargs)
        # a view selects entries of J's rows in the same way only if the parameter is contiguous
        if whole is None or not (whole.path or whole.twin.is_contiguous()):
            return self._derive(number, func, args, kwargs)

        views = list(result) if isinstance(result, tuple | list) else [result]
        are_parts = [is_part(view, whole.handle, _flat(args[1:], kwargs)) for view in views]
        if len(views) > MOST_PARTS or not any(are_parts):
            return self._derive(number, func, args, kwargs)
        if not all(are_parts):
            self._note_unruled(args)
        # tuples: the function may change its lists later
        options = tuple(tuple(a) if isinstance(a, list) else a for a in args[1:])
        named = {k: tuple(a) if isinstance(a, list) else a for k, a in kwargs.items()}
        twins = func(whole.twin, *options, **named)
        for item, view in enumerate(views):
            if are_parts[item]:
                is_single = view is result
                step = View(func, options, named, None if is_single else item)
                twin = twins if is_single else twins[item]
                with untracked():
                    self.track(whole.number, view, twin, (*whole.path, step))
        return result

    def _use(
        self,
        number: int,
        rule: Rule,
        func: Callable[..., Any],
        args: Args,
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Call an operation that has a rule, with twins of the parameters that the rule covers."""
        named = rule.named(args, kwargs) or {}
        with untracked():
            forms = self._forms(number, func, rule, named) if named else {}
            tracked = {name: self._find(named[name]) for name in forms}
            params = {name: param for name, param in tracked.items() if param is not None}
            twins = {name: param.twin.view_as(param.twin) for name, param in params.items()}
        if not params:
            self._note_unruled((*args, *kwargs.values()))
            return func(*args, **kwargs)
        covered = {id(named[name]) for name in params}
        if self._placing.can_share and any(
            id(x) in self._tracked and id(x) not in covered
            for x in _tensors((*args, *kwargs.values()))
        ):
            return self._derive(number, func, args, kwargs)
        names = [*rule.defaults, *range(len(args))]  # of further arguments there is no name
        args = tuple(twins.get(name, x) for name, x in zip(names, args, strict=False))
        kwargs = {name: twins.get(name, value) for name, value in kwargs.items()}
        self._note_unruled((*args, *kwargs.values()))
        out = self._placing.call(rule, func, args, kwargs)
        with untracked():
            out = no_view(out)
            parts = [(p.number, p.path, forms[name]) for name, p in params.items()]
            try:
                out, values, place = self._placing.result(number, func, out)
            except NoLayout as error:
                raise NoLayout(self.parameters(p.number for p in params.values())) from error
            if not values.requires_grad:
                return out
            self._watch_inputs(named.values())
            ends = {twin.grad_fn for twin in twins.values()}
            if place is None:
                return self._derived_from((number, OUT), out, parts, ends)
            nodes, last = nodes_of_call(values, ends), values.grad_fn
            anchor, key = Anchor.behind(values), (number, OUT)
            self.uses.append(Use(key, anchor, place, parts, last, ends, nodes, values.nbytes))
        return out

    def _forms(
        self, number: int, func: Callable[..., Any], rule: Rule, named: Mapping[str, Any]
    ) -> Mapping[str, FormOf]:
        """The form of each parameter, by argument; none where an argument has no samples in it.

        Sparse tensors of all samples can't be had from inside vmap.
        """
        tensors = {name: x for name, x in named.items() if isinstance(x, Tensor)}
        if not all(x.layout == torch.strided for x in tensors.values()):
            return {}
        place = self._placing.of_all
        try:
            every = {
                name: place((number, name), x, func, rule, id(x) in self._tracked)
                for name, x in tensors.items()
            }
        except NoLayout:
            return {}
        return rule.forms_of(**{**named, **every})

    def _derive(
        self, number: int, func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]
    ) -> Any:
        """Call an operation without a rule, whose result all samples may share."""
        if not self._placing.can_share:
            self._note_unruled((*args, *kwargs.values()), func in RAW_MEMORY)
            return func(*args, **kwargs)
        tensors = [x for x in _tensors((*args, *kwargs.values())) if id(x) in self._tracked]
        key, is_shared, out = (number, OUT), self._placing.is_shared((number, OUT), func), None
        if is_shared is None:  # to be learned, on tensors that it may write into
            out = func(*args, **kwargs)
            is_shared = self._placing.becomes_shared(key, func, out)
        params = [param for param in map(self._find, tensors) if param is not None]
        if not is_shared or len(params) < len(tensors):
            self._note_unruled((*args, *kwargs.values()))
            return func(*args, **kwargs) if out is None else out
        with untracked():
            twins = [param.twin.view_as(param.twin) for param in params]
        by_id = {id(x): twin for x, twin in zip(tensors, twins, strict=True)}
        named = {name: replaced(x, by_id) for name, x in kwargs.items()}
        out = func(*replaced(args, by_id), **named)
        with untracked():
            if not out.requires_grad:
                return out
            parts, ends = (
                through_graph(out, params, twins, self._grad_mode),
                {t.grad_fn for t in twins},
            )
            return self._derived_from(key, out, parts, ends)

    def _derived_from(
        self, key: Key, out: Tensor, parts: Sequence[UsedPart], ends: set[Any]
    ) -> Tensor:
        """Track a result that all samples share, as if it were a parameter itself.

        What its own uses pull back goes on to the parameters that it was made of.

        Raises:
            NoLayout: if it depends on something else, too, which would be cut off.
        """
        if Graph.of((out,), ends).leads_out:
            raise NoLayout(self.parameters(part[0] for part in parts))
        anchor = differentiable_alias(out, self._grad_mode)
        handle, number = anchor.view_as(anchor), self._count + len(self.derived)
        self.derived[number] = Derived(key, out.detach(), parts)
        self._starts[handle.grad_fn] = number
        self.track(number, handle, anchor.view_as(anchor))
        return handle

    def _watch_inputs(self, inputs: Iterable[Any]) -> None:
        """Keep the versions of what went into a recorded operation."""
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if self._level is not None:
            tensors = list(map(below_transforms, tensors))
        self._inputs += [(x, x._version) for x in tensors if not x.is_inference()]

    def parameters(self, numbers: Iterable[int]) -> set[int]:
        """The parameters with these numbers, and those that derived results are made of."""
        return parameters_of(list(numbers), self.derived)


def _is_written(tracked: TrackedParameter) -> bool:
    """Has something written into the tensor since it is tracked?"""
    return tracked.memory._version != tracked.version


def _is_chosen_by_tensor(func: Callable[..., Any], args: Args) -> bool:
    """Does a call choose entries of a tensor by the numbers in another one?"""
    if func is not Tensor.__getitem__ and func is not Tensor.__setitem__:
        return False
    items = args[1] if isinstance(args[1], tuple) else args[1:2]
    return any(isinstance(item, Tensor | list) for item in items)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and in lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (tuple, list):
            yield from _tensors(value)


def _flat(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments, with the items of lists in the place of these."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, tuple | list):
            yield from value
        else:
            yield value
