"""Records, while a function runs, which operations use a parameter, and by which rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from jacfunc._errors import Refused
from jacfunc._factored.derived import DerivedResults, replaced, through_graph
from jacfunc._factored.learned import users_modes
from jacfunc._factored.tracked import RuledCall, TrackedParameters, UnruledUse, add_parts
from jacfunc._factored.use import HOOKING, METADATA, RAW_MEMORY, VIEWS, KnownUse, Use, View, is_part
from jacfunc._faults import FREEZING, TAKES_DERIVATIVES
from jacfunc._layouts import (
    FEWEST_PULLED,
    OUT,
    Args,
    NoLayout,
    OperationRecorder,
    Placing,
    are_among,
    tensors_in,
)
from jacfunc._linear_map import Anchor, Graph, no_view
from jacfunc._torch import PULLED, below_transforms, innermost, untracked
from jacfunc.layers import FormOf, Rule, table

MOST_PARTS = 32
"""A parameter that is split into more parts than this is faster without factors."""

UNUSUAL = frozenset({*TAKES_DERIVATIVES, *HOOKING})
"""Operations that are looked at without a parameter, too."""


class UseRecorder(OperationRecorder):
    """A context that records every operation with a rule that is called with a tracked parameter.

    Parameters are known by identity, so a function must call operations with them as they are, or
    with views of them. The recorded operation gets a twin of the parameter instead: a path in the
    graph to the parameter itself then shows a use that no rule has seen.

    Args:
        placing: says where tensors hold the samples.
        params: the parameters whose uses are looked for.
        starts: nodes at which the walk through the graph ends, with the numbers of the parameters.
            Those of results that all samples share are added.
        grad_mode: may the Jacobian be differentiated further?
        known: operations with rules, by number, as earlier evaluations have shown.
    """

    def __init__(
        self,
        placing: Placing,
        params: TrackedParameters,
        starts: dict[Any, int],
        grad_mode: bool,
        known: dict[int, KnownUse],
    ) -> None:
        self._rules, self._openings = table().rules, table().openings
        if users_modes():  # what an operation returns may not be what its rule says
            self._rules = {}
        noticed = UNUSUAL | self._openings.keys()
        super().__init__(placing.listener, noticed, params.by_id)
        placing.operations = self.operations
        self._placing, self._params = placing, params
        self._grad_mode = grad_mode
        self.uses: list[Use] = []
        self._known, self._later = known, list[tuple[Use, RuledCall]]()
        # what operations with rules have read
        self._inputs, self._versions = list[Tensor](), list[int]()
        self.derived = DerivedResults(params, starts, grad_mode)
        self._level = innermost()

    def finish(self) -> UnruledUse:
        """Check the record once the function has run; the parameters that no rule covers.

        Raises:
            Refused: if an input of an operation was written into later, as autograd refuses it.
            UnseenWrite: if a parameter that is no copy was written into, unseen.
            Outdated: if a call is not what was known of it.
        """
        with untracked(), torch.set_grad_enabled(self._grad_mode):
            if [x._version for x in self._inputs] != self._versions:
                raise Refused("what went into a layer was written into after it")
            written, unruled = self._params.written(), self._params.unruled
            add_parts(self._later, self._placing)
        unruled.written |= written
        unruled.numbers |= written
        self.derived.put_parameters_into(unruled.written, unruled.numbers)
        return unruled

    def call(
        self,
        number: int,
        func: Callable[..., Any],
        args: Args,
        kwargs: Mapping[str, Any],
        is_tracked: bool,
    ) -> Any:
        if func in TAKES_DERIVATIVES and self._is_at_own_level():
            raise Refused("the function takes a derivative itself, of what may stand for others")
        is_used = is_tracked and self._is_at_own_level()
        if func in self._openings and (is_used or self._is_under_vmap()):
            with self:
                return self._openings[func](*args, **kwargs)
        if func in HOOKING:
            if func is Tensor.retain_grad:
                return None  # nobody reads what it keeps, and a second sweep would add to it
            if func is Tensor.register_hook and (is_tracked or self._is_under_vmap()):
                raise Refused("a hook on a parameter, or on all samples of a tensor, is passed by")
            self._params.note_hook(args[0], self.uses)
        if not is_tracked:
            return func(*args, **kwargs)
        if is_used and func in VIEWS:
            return self._view(number, func, args, kwargs)
        if is_used and func in self._rules and number not in self._params.hooked:
            return self._use(number, self._rules[func], func, args, kwargs)
        if func in FREEZING:
            self._params.note_unruled(args, may_write_unseen=True)
            self._params.by_id.pop(id(args[0]), None)  # it may be a constant from here on
            return func(*args, **kwargs)
        if is_used and func not in METADATA and func not in RAW_MEMORY:
            return self._derive(number, func, args, kwargs)
        if func not in METADATA:
            self._params.note_unruled((*args, *kwargs.values()), func in RAW_MEMORY)
        return func(*args, **kwargs)

    def _is_at_own_level(self) -> bool:
        """Is the operation differentiated, and inside no further transform?"""
        return torch.is_grad_enabled() and innermost() == self._level

    def _is_under_vmap(self) -> bool:
        """Is the operation under our vmap? Then torch's fused layers must be opened anyway."""
        return self._level is not None and innermost() == self._level

    def _view(
        self, number: int, func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]
    ) -> Any:
        """Call a function that makes views of a parameter, and track the views, too."""
        whole, result = self._params.find(args[0]) if args else None, func(*args, **kwargs)
        # a view selects entries of J's rows in the same way only if the parameter is contiguous
        if whole is None or not (whole.path or whole.twin.is_contiguous()):
            return self._derive(number, func, args, kwargs)

        views = list(result) if isinstance(result, tuple | list) else [result]
        are_parts = [is_part(view, whole.handle, args[1:], kwargs) for view in views]
        if len(views) > MOST_PARTS or not any(are_parts):
            return self._derive(number, func, args, kwargs)
        if not all(are_parts):
            self._params.note_unruled(args)
        self._params.track_views(whole, View(func, args[1:], kwargs), result, are_parts)
        return result

    def _use(
        self, number: int, rule: Rule, func: Any, args: Args, kwargs: Mapping[str, Any]
    ) -> Any:
        """Call an operation that has a rule, with twins of the parameters that the rule covers."""
        params, forms = self._params, None
        call = RuledCall(number, rule, func, rule.named(args, kwargs) or {})
        known = self._known.get(number)
        with untracked():
            is_known = known is not None and call.is_like(known, self._placing, params)
            if not is_known:
                forms = call.forms(self._placing, params)
                found = {name: params.find(call.named[name]) for name in forms}
                call.params |= {name: param for name, param in found.items() if param is not None}
            twins = {name: p.twin.view_as(p.twin) for name, p in call.params.items()}
        if not is_known:
            covered = {id(param.handle) for param in call.params.values()}
            has_others = are_among((*args, *kwargs.values()), params.by_id, covered)
            if covered and has_others and self._placing.can_share:
                return self._derive(number, func, args, kwargs)
        places = [*rule.defaults, *range(len(args))]  # arguments without names have numbers
        args = tuple(map(twins.get, places, args))
        if kwargs:
            kwargs = {name: twins.get(name, value) for name, value in kwargs.items()}
        if not is_known:
            params.note_unruled((*args, *kwargs.values()))
            if not twins:
                return func(*args, **kwargs)
            if not has_others and (known := call.known()):
                self._known[number] = known
        is_plain = self._level is None
        is_large = func in PULLED and args and args[0].numel() >= FEWEST_PULLED
        run = PULLED[func] if is_large else func
        out = run(*args, **kwargs) if is_plain else self._placing.call(rule, func, args, kwargs)
        with untracked():
            out = out if is_plain and not out._is_view() else no_view(out)
            return self._used(call, out, {x.grad_fn for x in twins.values()}, forms)

    def _used(
        self, call: RuledCall, out: Tensor, ends: set[Any], forms: Mapping[str, FormOf] | None
    ) -> Any:
        """The result of a use, which is noted; without forms, these are made by :meth:`finish`."""
        try:
            out, values, place = self._placing.result(call.number, call.func, out)
        except NoLayout as error:
            raise NoLayout(
                self.derived.parameters(p.number for p in call.params.values())
            ) from error
        if not values.requires_grad:
            return out
        for name, x in call.named.items():
            if isinstance(x, Tensor) and name not in call.params:
                tensor = below_transforms(x)
                if not tensor.is_inference():  # torch counts no writes into it
                    self._inputs.append(tensor)
                    self._versions.append(tensor._version)
        if place is None:
            parts = call.known_parts(self._placing) if forms is None else call.parts(forms)
            return self.derived.track((call.number, OUT), out, parts, Graph.of((out,), ends))
        key, anchor = (call.number, OUT), Anchor.behind(values)
        use = Use(key, anchor, place, values.grad_fn, ends, values.nbytes)
        if forms is None:
            self._later.append((use, call))
        else:
            use.parts = call.parts(forms)
        self.uses.append(use)
        return out

    def _derive(
        self, number: int, func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]
    ) -> Any:
        """Call an operation without a rule, whose result all samples may share."""
        if not self._placing.can_share:
            self._params.note_unruled((*args, *kwargs.values()), func in RAW_MEMORY)
            return func(*args, **kwargs)
        tensors = [x for x in tensors_in((*args, *kwargs.values())) if id(x) in self._params.by_id]
        key, is_shared, out = (number, OUT), self._placing.is_shared((number, OUT), func), None
        if is_shared is None:  # to be learned, on tensors that it may write into
            out = func(*args, **kwargs)
            is_shared = self._placing.becomes_shared(key, func, out)
        params = [param for param in map(self._params.find, tensors) if param is not None]
        if not is_shared or len(params) < len(tensors):
            self._params.note_unruled((*args, *kwargs.values()))
            return func(*args, **kwargs) if out is None else out
        with untracked():
            twins = [param.twin.view_as(param.twin) for param in params]
        by_id = {id(x): twin for x, twin in zip(tensors, twins, strict=True)}
        named = {name: replaced(x, by_id) for name, x in kwargs.items()}
        out = func(*replaced(args, by_id), **named)
        with untracked():
            if not out.requires_grad:
                return out
            graph = Graph.of((out,), {twin.grad_fn for twin in twins})
            parts = through_graph(out, params, twins, graph, self._grad_mode)
            return self.derived.track(key, out, parts, graph)
