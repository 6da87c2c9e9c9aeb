"""Records, while a function runs, which operations use a parameter, and by which rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jacfunc._errors import Refused
from jacfunc._factored.tracked import UNSEEN_WRITE, TrackedParameter, UnruledUse
from jacfunc._factored.use import Use
from jacfunc._factored.views import METADATA, RAW_MEMORY, VIEWS, Path, View, is_part
from jacfunc._faults import FREEZING, TAKES_DERIVATIVES
from jacfunc._linear_map import Anchor, nodes_of_call
from jacfunc._torch import (
    batched,
    below_transforms,
    call_of_all_samples,
    innermost,
    of_all_samples,
    unbatched,
    untracked,
)
from jacfunc.layers import FormOf, Rule, table

MOST_PARTS = 32
"""A parameter that is split into more parts than this is faster without factors."""


class UseRecorder(TorchFunctionMode):
    """A context that records every operation with a rule that is called with a tracked parameter.

    Parameters are known by identity, so a function must call operations with them as they are, or
    with views of them. The recorded operation gets a twin of the parameter instead: a path in the
    graph to the parameter itself then shows a use that no rule has seen.

    Args:
        size: the number of samples.
        lent: numbers of the parameters that are no copies, which must not be written into.
        unruled: is told which parameters operations without a rule get.
    """

    def __init__(self, size: int, lent: Set[int], unruled: UnruledUse) -> None:
        super().__init__()
        self._lent, self._unruled = lent, unruled
        self._uses: list[Use] = []
        self._inputs: list[tuple[Tensor, int]] = []
        """Inputs of recorded operations, and the versions that they had then."""
        self._size = size
        self._tracked: dict[int, TrackedParameter] = {}
        self._level = innermost()
        self._rules, self._openings = table().rules, table().openings

    def uses(self) -> list[Use]:
        """The recorded operations, once the function has run.

        Raises:
            Refused: if an input of an operation was written into later, as autograd refuses it.
            RuntimeError: if a parameter that is no copy was written into, unseen.
        """
        with untracked():
            if any(x._version != version for x, version in self._inputs):
                raise Refused("what went into a layer was written into after it")
            written = {t.number for t in self._tracked.values() if not t.is_intact}
        if written & self._lent:
            raise RuntimeError(UNSEEN_WRITE)
        self._unruled.numbers.update(written)
        self._unruled.written.update(written)
        return self._uses

    def track(self, number: int, handle: Tensor, twin: Tensor, path: Path = ()) -> None:
        """Track a tensor that is parameter ``number``, or the view of it that the path makes."""
        version = below_transforms(handle)._version
        self._tracked[id(handle)] = TrackedParameter(number, handle, twin, path, version)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # called for every operation: as short as it can be
        kwargs = kwargs or {}
        if func in TAKES_DERIVATIVES and self._is_at_own_level():
            raise Refused("the function takes a derivative itself, of what may stand for others")
        has_parameter = self._has_tracked(args) or self._has_tracked(kwargs.values())
        is_used = has_parameter and self._is_at_own_level()
        if func in self._openings and (is_used or self._is_under_vmap()):
            with self:
                return self._openings[func](*args, **kwargs)
        if is_used and func in VIEWS:
            return self._view(func, args, kwargs)
        if is_used and func in self._rules:
            return self._use(self._rules[func], func, args, kwargs)
        if has_parameter and func is Tensor.register_hook:
            raise Refused("a parameter has a hook, which layers' factors pass by")
        if has_parameter and func not in METADATA:
            self._note_unruled((*args, *kwargs.values()), func in RAW_MEMORY | FREEZING)
        if has_parameter and func in FREEZING:
            self._tracked.pop(id(args[0]), None)  # it may be a constant from here on
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
                if is_lent and not tracked.is_intact:
                    raise RuntimeError(UNSEEN_WRITE)
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
        if tracked is None or not tracked.is_intact or tracked.number in self._unruled.written:
            return None
        return tracked

    def _view(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Call a function that makes views of a parameter, and track the views, too."""
        whole, result = self._find(args[0]) if args else None, func(*args, **kwargs)
        # a view selects entries of J's rows in the same way only if the parameter is contiguous
        if whole is None or not (whole.path or whole.twin.is_contiguous()):
            self._note_unruled((*args, *kwargs.values()))
            return result

        views = list(result) if isinstance(result, tuple | list) else [result]
        are_parts = [is_part(view, whole.handle, _flat(args[1:], kwargs)) for view in views]
        if len(views) > MOST_PARTS or not all(are_parts):
            self._note_unruled(args)
        if len(views) > MOST_PARTS or not any(are_parts):
            return result
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
        self, rule: Rule, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Call an operation that has a rule, with twins of the parameters that the rule covers."""
        named = rule.named(args, kwargs) or {}
        with untracked():
            forms = self._forms(rule, named) if named else {}
            tracked = {name: self._find(named[name]) for name in forms}
            params = {name: param for name, param in tracked.items() if param is not None}
            twins = {name: param.twin.view_as(param.twin) for name, param in params.items()}
        if not params:
            self._note_unruled((*args, *kwargs.values()))
            return func(*args, **kwargs)
        by_position = zip(rule.defaults, args, strict=False)
        args = tuple(twins.get(name, value) for name, value in by_position)
        kwargs = {name: twins.get(name, value) for name, value in kwargs.items()}
        self._note_unruled((*args, *kwargs.values()))
        if rule.keeps_lead and args:
            out = call_of_all_samples(func, args, kwargs, self._level)
        else:
            out = func(*args, **kwargs)
        with untracked():
            parts = [(p.number, p.path, forms[name]) for name, p in params.items()]
            return self._recorded(out, parts, twins.values(), named.values())

    def _forms(self, rule: Rule, named: Mapping[str, Any]) -> Mapping[str, FormOf]:
        """The form of each parameter, by argument; none where an argument is a sparse tensor."""
        if not all(map(_is_dense, named.values())):
            return {}
        return rule.forms_of(**{name: self._of_all(value) for name, value in named.items()})

    def _recorded(
        self,
        out: Tensor,
        parts: Sequence[tuple[int, Path, FormOf]],
        twins: Iterable[Tensor],
        inputs: Iterable[Any],
    ) -> Tensor:
        """The output of an operation, batched, once the operation is recorded."""
        out = batched(out, self._size, self._level)
        values, dim = unbatched(out, self._level)
        if values._is_view():  # a write into one would change the node that it is differentiated by
            values, dim = unbatched(out := out.clone(), self._level)
        if values.requires_grad:
            ends = {twin.grad_fn for twin in twins}
            nodes = nodes_of_call(values, ends)
            use = Use(Anchor.behind(values), dim, parts, values.grad_fn, ends, nodes, values.nbytes)
            self._uses.append(use)
            below = (below_transforms(x) for x in inputs if isinstance(x, Tensor))
            self._inputs += [(x, x._version) for x in below if not x.is_inference()]
        return out

    def _of_all(self, value: Any) -> Any:
        """A tensor as ``[B, *shape]`` of all samples; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        return of_all_samples(value, self._size, self._level)


def _is_dense(value: Any) -> bool:
    """Is it no sparse tensor? Those of all samples can't be had from inside vmap."""
    return not isinstance(value, Tensor) or value.layout == torch.strided


def _flat(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments, with the items of lists in the place of these."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, tuple | list):
            yield from value
        else:
            yield value
