"""A call of a module as a function of its parameters and inputs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from jacfunc._calls import Derivation, FlatCall, ModuleOrigin
from jacfunc._layouts import begins, ends
from jacfunc._lending import ModuleState
from jacfunc._linear_map import Samples
from jacfunc._lock import alone
from jacfunc._memory import sparing
from jacfunc._modules.independence import Independence
from jacfunc._modules.inputs import POSITIONS, InputChoice, OwnArguments, noted
from jacfunc._modules.options import (
    Batching,
    check_batch_first,
    check_call,
    check_devices,
    check_module_inputs,
    check_parameters,
    dims_of_samples,
)
from jacfunc._outputs import Asked, ChosenOutputs
from jacfunc._remembered import CallKind
from jacfunc._samples import SampledCall, Subject
from jacfunc._torch import RandomState, inside_derivative, is_outermost, is_pushing, untracked
from jacfunc._trees import Arguments, Split, flatten
from jacfunc._trials import IN_FRONT, OutputDims, Trials, batch_norms, of_one, subject_of
from jacfunc._types import Argnums, Leaves, Tree, is_differentiable, is_tensor
from jacfunc.strategies import worded


@dataclass(eq=False)
class ModuleCall:
    """A module at the arguments of one call; by default differentiated by its parameters.

    Args:
        arguments: positional ones, and those by keyword.
        argnums: what it is differentiated by, see :func:`argnums_of`.
        choice: which of the inputs, if by inputs.
        with_buffers: does it return its output and its buffers, rather than the output alone?
        output_dims: where the outputs hold the samples, if there are samples.
        create_graph: is the Jacobian differentiable in parameters and inputs?
        asked: which outputs are asked for; None for all.
        chosen: which these are, once it is known.
    """

    api: str
    state: ModuleState
    arguments: Arguments
    argnums: Argnums = POSITIONS["params"]
    choice: InputChoice = field(default_factory=InputChoice)
    with_buffers: bool = False
    create_graph: bool = False
    independence: Independence = field(default_factory=Independence)
    asked: Asked | None = None
    output_dims: OutputDims = IN_FRONT
    chosen: ChosenOutputs | None = None

    def with_samples(self, batching: Batching | None, keeps_all: bool = False) -> ModuleCall:
        """The call that knows where outputs hold the samples, and which outputs are asked for.

        It returns samples in front. Where the module has them is seen at the first call of a kind,
        by calling it with one sample. With ``keeps_all`` it returns all outputs beside those asked.
        """
        call, leaves = self, self._split.leaves
        if batching is not None and is_outermost():
            dims = dims_of_samples(self.api, batching.in_dims, self.arguments, self._split)[1]
            call = replace(self, output_dims=self._trials.output_dims(leaves, dims))
        if self.asked is None:
            return call
        if batching is None:
            whole = partial(call._returned, leaves, int)
            chosen = ChosenOutputs.of_call(self.api, self.asked, keeps_all, whole)
        else:
            batch, at_once = call.batch(batching), self.independence.at_once
            with call.undisturbed():
                chosen = ChosenOutputs.of_batch(batch, self.asked, keeps_all, at_once)
        return replace(call, chosen=chosen)

    @property
    def _trials(self) -> Trials:
        return Trials(self.api, self.state, self._split, self._returned)

    def _returned(self, leaves: Leaves, prepare: Callable[[], object]) -> Tree:
        """What the module returns for tensors in the place of those of the arguments."""
        args, kwargs = self._split.merge(tuple(map(Tensor.clone, leaves)))
        own = {n: p.detach().clone().requires_grad_() for n, p in self._variables().items()}
        with self.undisturbed(), torch.no_grad(), self.state.lent_for_evaluation(own):
            prepare()
            return self.state.module(*args, **kwargs)

    def batch(self, batching: Batching) -> SampledCall:
        """The call at many samples, which are those of its arguments."""
        split, state = self._split, self.state
        every_dim, dims = dims_of_samples(self.api, batching.in_dims, self.arguments, split)
        check_batch_first(self.api, state, dims)
        if norms := batch_norms(state):
            self._trials.check_norms(norms, split.leaves)

        def call_of(leaves: Leaves) -> FlatCall:
            return self._call_of(leaves, every_dim)

        def whole(leaves: Leaves) -> tuple[FlatCall, dict[int, int]]:
            call = self._call_of(leaves)
            places = {id(x): i for i, x in enumerate(leaves) if dims[i] is not None}
            numbers = (n for n, primal in enumerate(call.primals) if id(primal) in places)
            return call, {n: places[id(call.primals[n])] for n in numbers}

        def guard(signature: int, may_mix: bool) -> bool:
            check, operations = self.independence.check_evaluation, (signature, may_mix)
            # not of the batch, which holds this: a cycle would keep the module alive
            return check(self.api, state, kind.kind, operations, lambda: self.subject(samples))

        of_call = self.argnums, tuple(state.point), split.kinds, tuple(dims)
        every = CallKind(state.module, of_call, state.version)
        kind = every if self.chosen is None else self.chosen.among(every)
        samples = Samples(split.leaves, dims, batching.randomness)
        ways = whole, not self.with_buffers, guard
        by = self._differentiates("params"), self._differentiates("inputs")
        batch = SampledCall(self.api, call_of, samples, every, *ways, by)
        return batch if self.chosen is None else self.chosen.of_samples(batch)

    def check_independent(self, batch: SampledCall) -> None:
        """Refuse samples that depend on each other; inside a transform nothing can be compared."""
        if is_outermost() and batch.size > 1:
            check, kind = self.independence.check, batch.kind.kind
            check(self.api, self.state, kind, lambda: self.subject(batch.samples))

    def subject(self, samples: Samples) -> Subject:
        """What is compared: the module at the batch, with all parameters but TorchScript's."""
        by_inputs, width = self._differentiates("inputs"), 0
        if self._differentiates("params"):
            width += sum(param.numel() for param in self.state.point.values())
        if by_inputs:
            inputs = filter(is_differentiable, flatten(self.choice.split(self.arguments))[0])
            width += sum(x.numel() for x in inputs) // samples.size
        every = self.chosen.without_own(samples) if self.chosen else samples
        in_front = self.output_dims.in_front
        return subject_of(self.state, self._split.merge, in_front, every, width, by_inputs)

    @contextmanager
    def undisturbed(self, is_settled: bool = False) -> Iterator[None]:
        """Around all sweeps, which change nothing outside; it checks a call that is not settled."""
        state, params = self.state, self._variables()
        tensors = (*state.point.values(), *state.params.values(), *state.buffers.values())
        check_call(self.api, self.create_graph)
        if not is_settled:
            check_devices(self.api, state)
            if self._differentiates("inputs"):
                check_module_inputs(self.api, self.choice.split(self.arguments))
            if self._differentiates("params"):
                check_parameters(self.api, state)
        with alone(), sparing(self.independence.memory):
            random_state = RandomState(tensors)
            try:
                grad_mode = self.create_graph and torch.is_grad_enabled()
                with torch.set_grad_enabled(grad_mode), state.lent_for_call(self.api, params):
                    yield
            except Exception:
                must = "the module must be one that torch can differentiate"
                with worded(self.api, must), noted(self.api, self._split.leaves):
                    raise
            finally:
                random_state.repeat()

    @cached_property
    def _split(self) -> Split:
        """The arguments, split into tensors and constants."""
        return Split.of(self.arguments, is_tensor)

    def _with(self, leaves: Leaves | None) -> tuple[Split, Arguments]:
        """The arguments, with other tensors if any are given."""
        if leaves is None or leaves is self._split.leaves:
            return self._split, self.arguments
        return replace(self._split, leaves=leaves), self._split.merge(leaves)

    def flat_call(self, leaves: Leaves | None = None) -> FlatCall:
        """The call as a function of leaves, at its arguments, or with other tensors in their place.

        It returns what is asked for of the outputs, by tensors that come after the arguments'.
        """
        if self.chosen is None:
            return self._call_of(leaves)
        return self.chosen.of_whole(self._call_of, leaves)

    def _call_of(
        self, leaves: Leaves | None = None, dims: Sequence[int | None] | None = None
    ) -> FlatCall:
        """The call with all outputs, as a function of leaves.

        With ``dims`` these tensors are those of one sample, without the dimension of samples; the
        module gets a batch of one.
        """
        split, arguments = self._with(leaves)
        # plans go by what this closes over, the module above all
        state, module, variables = self.state, self.state.module, self._variables()
        hooks = state.hooks() if variables else {}
        if hooks and self.create_graph:
            raise NotImplementedError(
                f"{self.api}: with create_graph=True parameters must have no hooks, which would "
                f"change second derivatives twice, got some on {', '.join(hooks)}. Remove them."
            )

        def call(params: dict[str, Tensor], chosen: Tree, arguments: Arguments) -> Tree:
            args, kwargs = originals.copied(chosen)
            if is_pushing():
                state.check_forward()
            for name, own in hooks.items() if params else ():
                for hook in own if params[name].requires_grad else ():
                    params[name].register_hook(hook)
            followed = (args, kwargs) if params else None
            with state.lent_for_evaluation(params or variables, followed):
                begins(module, state.buffers.values())
                output = module(*args, **kwargs)
                ends()
                if inside_derivative():  # where no graph is looked at
                    with untracked():
                        state.check_fresh(flatten(output)[0])
                output = self.output_dims.in_front(output)
                if dims is not None:
                    output = of_one(self.api, output)
                return (output, state.buffers_now()) if self.with_buffers else output

        originals = OwnArguments(self.choice, arguments, split, dims)
        params = variables if self._differentiates("params") else {}
        chosen = self.choice.split(arguments) if self._differentiates("inputs") else None
        every = (params, chosen, arguments)

        def kind() -> Hashable:
            # parameters keep their shapes: calls of one module differ in their inputs
            return self.argnums, tuple(variables), originals.kinds

        derivation = Derivation(self.api, call, self.argnums, self.with_buffers)
        return FlatCall(derivation, every, {}, ModuleOrigin(state, kind))

    def _variables(self) -> dict[str, Tensor]:
        """Parameters for which evaluations get other tensors; all others are constants."""
        return self.state.point if self.create_graph or self._differentiates("params") else {}

    def _differentiates(self, what: str) -> bool:
        argnums = (self.argnums,) if isinstance(self.argnums, int) else self.argnums
        return POSITIONS[what] in argnums
