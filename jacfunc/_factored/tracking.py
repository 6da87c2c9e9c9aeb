"""Records, while a function runs, which operations use a parameter, and by which rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jacfunc._errors import Refused
from jacfunc._factored.derived import Derived, parameters_of, replaced, through_graph
from jacfunc._factored.learned import Outdated
from jacfunc._factored.tracked import (
    RuledCall,
    TrackedParameters,
    Versions,
    tensors_among,
    without_lists,
)
from jacfunc._factored.use import (
    HOOKING,
    METADATA,
    RAW_MEMORY,
    VIEWS,
    KnownUse,
    Use,
    UsedPart,
    View,
    is_part,
    names_of_tensors,
)
from jacfunc._faults import FREEZING, TAKES_DERIVATIVES
from jacfunc._layouts import OUT, Args, Key, NoLayout, OperationRecorder, Placing
from jacfunc._linear_map import Anchor, Graph, differentiable_alias, no_view, nodes_of_call
from jacfunc._torch import innermost, untracked
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
        super().__init__(placing.listener)
        placing.operations = self.operations
        self._placing, self._params = placing, params
        self._starts, self._grad_mode = starts, grad_mode
        self.uses: list[Use] = []
        self._known, self._later = known, list[tuple[Use, RuledCall]]()
        self._inputs = Versions()
        self.derived: dict[int, Derived] = {}
        """Results that all samples share, by the numbers that they have among parameters."""
        self._count = 1 + max(starts.values(), default=0)
        self._level = innermost()
        self._rules, self._openings = table().rules, table().openings

    def finish(self) -> None:
        """Check the record once the function has run.

        Raises:
            Refused: if an input of an operation was written into later, as autograd refuses it.
            UnseenWrite: if a parameter that is no copy was written into, unseen.
            Outdated: if a call is not what was known of it.
        """
        with untracked(), torch.set_grad_enabled(self._grad_mode):
            if self._inputs.have_changed():
                raise Refused("what went into a layer was written into after it")
            written = self._params.written()
            for use, call in self._later:
                use.parts = call.parts(self._forms_as_known(call))
        for use in self.uses:
            use.nodes = nodes_of_call(use.last, use.ends)
        unruled = self._params.unruled
        for numbers in (unruled.written, unruled.numbers):
            params = self.parameters(numbers | written)
            numbers.clear()
            numbers.update(params)

    def call(
        self, number: int, func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]
    ) -> Any:
        has_parameter = self._params.are_among(args) or self._params.are_among(kwargs.values())
        if not (has_parameter or func in UNUSUAL or func in self._openings):  # the usual case
            return func(*args, **kwargs)
        if func in TAKES_DERIVATIVES and self._is_at_own_level():
            raise Refused("the function takes a derivative itself, of what may stand for others")
        is_used = has_parameter and self._is_at_own_level()
        if func in self._openings and (is_used or self._is_under_vmap()):
            with self:
                return self._openings[func](*args, **kwargs)
        if func in HOOKING:
            if func is Tensor.retain_grad:
                return None  # nobody reads what it keeps, and a second sweep would add to that
            if has_parameter or self._is_under_vmap():
                raise Refused("a hook on a parameter, or on all samples of a tensor, is passed by")
        if not has_parameter:
            return func(*args, **kwargs)
        if is_used and func in VIEWS:
            return self._view(number, func, args, kwargs)
        if is_used and func in self._rules:
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
        are_parts = [is_part(view, whole.handle, without_lists(args[1:], kwargs)) for view in views]
        if len(views) > MOST_PARTS or not any(are_parts):
            return self._derive(number, func, args, kwargs)
        if not all(are_parts):
            self._params.note_unruled(args)
        self._params.track_views(whole, View(func, args[1:], kwargs), result, are_parts)
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
        call, forms = RuledCall(number, rule, func, rule.named(args, kwargs) or {}), None
        with untracked():
            names, named = names_of_tensors(call.named), call.named
            if not self._is_known(call, names):
                forms = self._forms(call)
                found = {name: self._params.find(named[name]) for name in forms}
                call.params |= {name: param for name, param in found.items() if param is not None}
            params = call.params
            twins = {name: param.twin.view_as(param.twin) for name, param in params.items()}
        covered = {id(param.handle) for param in params.values()}
        has_others = self._params.are_among((*args, *kwargs.values()), covered)
        if params and has_others and self._placing.can_share:
            return self._derive(number, func, args, kwargs)
        places = [*rule.defaults, *range(len(args))]  # of further arguments there is no name
        args = tuple([twins.get(name, x) for name, x in zip(places, args, strict=False)])
        if kwargs:
            kwargs = {name: twins.get(name, value) for name, value in kwargs.items()}
        self._params.note_unruled((*args, *kwargs.values()))
        if not params:
            return func(*args, **kwargs)
        out = self._placing.call(rule, func, args, kwargs)
        with untracked():
            if forms is not None and names is not None and not has_others:
                numbers = {name: param.number for name, param in params.items()}
                self._known[number] = KnownUse(func, names, numbers)
            return self._used(call, no_view(out), {x.grad_fn for x in twins.values()}, forms)

    def _used(
        self, call: RuledCall, out: Tensor, ends: set[Any], forms: Mapping[str, FormOf] | None
    ) -> Any:
        """The result of an operation with a rule, of which a note is taken."""
        try:
            out, values, place = self._placing.result(call.number, call.func, out)
        except NoLayout as error:
            raise NoLayout(self.parameters(p.number for p in call.params.values())) from error
        if not values.requires_grad:
            return out
        self._inputs.keep(call.values)
        if place is None:
            parts = call.parts(self._forms_as_known(call) if forms is None else forms)
            return self._derived_from((call.number, OUT), out, parts, Graph.of((out,), ends))
        key, anchor = (call.number, OUT), Anchor.behind(values)
        use = Use(key, anchor, place, values.grad_fn, ends, values.nbytes)
        if forms is None:
            self._later.append((use, call))
        else:
            use.parts = call.parts(forms)
        self.uses.append(use)
        return out

    def _is_known(self, call: RuledCall, names: list[str] | None) -> bool:
        """Was the operation seen at this place, with parameters in the same places?

        Then these are put into the call, and all other tensors as those of all samples. The rule is
        asked for forms when the function has run: all calls at once, and off the graph.
        """
        known = None if self._placing.listener else self._known.get(call.number)
        if known is None or known.func is not call.func or known.tensors != names:
            return False
        found = {name: self._params.find(call.named[name]) for name in known.params}
        params = {name: param for name, param in found.items() if param is not None}
        if {name: param.number for name, param in params.items()} != known.params:
            return False
        try:
            every = {name: self._of_all(call, name) for name in names if name not in params}
        except NoLayout:
            return False
        call.named.update(every)
        call.params.update(params)
        return True

    def _forms_as_known(self, call: RuledCall) -> Mapping[str, FormOf]:
        """The forms of a call that is known.

        Raises:
            Outdated: if the rule does not cover the same parameters.
        """
        every = {name: self._of_all(call, name, True) for name in call.params}
        forms = call.rule.forms_of(**{**call.named, **every})
        if not call.params.keys() <= forms.keys():
            self._known.clear()
            raise Outdated
        return forms

    def _of_all(self, call: RuledCall, name: str, is_parameter: bool = False) -> Tensor:
        """An argument of a call, of all samples."""
        key, value = (call.number, name), call.named[name]
        return self._placing.of_all(key, value, call.func, call.rule, is_parameter)

    def _forms(self, call: RuledCall) -> Mapping[str, FormOf]:
        """The form of each parameter, by argument; none where an argument has no samples in it.

        Sparse tensors of all samples can't be had from inside vmap.
        """
        tensors = {name: x for name, x in call.named.items() if isinstance(x, Tensor)}
        if not call.named or any(x.layout != torch.strided for x in tensors.values()):
            return {}
        params = self._params.by_id
        try:
            every = {n: self._of_all(call, n, id(x) in params) for n, x in tensors.items()}
        except NoLayout:
            return {}
        return call.rule.forms_of(**{**call.named, **every})

    def _derive(
        self, number: int, func: Callable[..., Any], args: Args, kwargs: Mapping[str, Any]
    ) -> Any:
        """Call an operation without a rule, whose result all samples may share."""
        if not self._placing.can_share:
            self._params.note_unruled((*args, *kwargs.values()), func in RAW_MEMORY)
            return func(*args, **kwargs)
        tensors = [
            x for x in tensors_among((*args, *kwargs.values())) if id(x) in self._params.by_id
        ]
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
            return self._derived_from(key, out, parts, graph)

    def _derived_from(
        self, key: Key, out: Tensor, parts: Sequence[UsedPart], graph: Graph
    ) -> Tensor:
        """Track a result that all samples share, as if it were a parameter itself.

        What its own uses pull back goes on to the parameters that it was made of.

        Raises:
            NoLayout: if it depends on something else, too, which would be cut off.
        """
        if graph.leads_out:
            raise NoLayout(self.parameters(part[0] for part in parts))
        anchor = differentiable_alias(out, self._grad_mode)
        handle, number = anchor.view_as(anchor), self._count + len(self.derived)
        self.derived[number] = Derived(key, out.detach(), parts)
        self._starts[handle.grad_fn] = number
        self._params.track(number, handle, anchor.view_as(anchor))
        return handle

    def parameters(self, numbers: Iterable[int]) -> set[int]:
        """The parameters with these numbers, and those that derived results are made of."""
        return parameters_of(list(numbers), self.derived)
