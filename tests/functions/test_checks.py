"""Every message of jacfunc's own: what must hold, what came, what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jacfunc
from jacfunc._memory.counting import PeakBytes

X, Y = torch.ones(3), torch.ones(2)
DOORS = {
    "jacrev": jacfunc.jacrev,
    "jacfwd": jacfunc.jacfwd,
    "jacobian": jacfunc.jacobian,
    "value_and_jacobian": jacfunc.value_and_jacobian,
    "hessian": jacfunc.hessian,
}
EVERY_DOOR = pytest.mark.parametrize("door", DOORS)


def product(x: Any, y: Any) -> Any:
    return x.sum() * y


# --- argnums ---


@EVERY_DOOR
@pytest.mark.parametrize("argnums", ["x", 1.0, None, [0], (0, "x"), {0}], ids=str)
def test_argnums_of_the_wrong_kind(door: str, argnums: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"^{door}: argnums must be an int or a tuple of ints, got"
    ):
        DOORS[door](product, argnums)(X, Y)


@EVERY_DOOR
def test_no_argnums(door: str) -> None:
    with pytest.raises(ValueError, match=rf"^{door}: argnums must name at least one argument, got"):
        DOORS[door](product, ())(X, Y)


@EVERY_DOOR
@pytest.mark.parametrize("argnums", [2, -3, (0, 2), (-3,)], ids=str)
def test_argnums_out_of_range(door: str, argnums: Any) -> None:
    message = rf"^{door}: argnums must be positions among the 2 positional arguments, got -?[23]\."
    with pytest.raises(ValueError, match=message):
        DOORS[door](product, argnums)(X, Y)


@EVERY_DOOR
@pytest.mark.parametrize("argnums", [(0, 0), (1, -1), (0, 1, -2)], ids=str)
def test_repeated_argnums(door: str, argnums: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{door}: argnums must be unique, got \({argnums[0]}"):
        DOORS[door](product, argnums)(X, Y)


def test_arguments_given_by_keyword_are_not_positional() -> None:
    with pytest.raises(ValueError, match=r"among the 0 positional arguments, got 0\. Pass the arg"):
        jacfunc.jacrev(torch.sin)(input=X)


# --- chunks and strategies ---


@EVERY_DOOR
@pytest.mark.parametrize("chunk_size", ["2", 2.0, True], ids=repr)
def test_chunk_size_of_the_wrong_kind(door: str, chunk_size: Any) -> None:
    with pytest.raises(
        TypeError, match=r": chunk_size must be an int or None, got (str|float|bool)"
    ):
        DOORS[door](torch.sin, chunk_size=chunk_size)


@EVERY_DOOR
@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunk_size_too_small(door: str, chunk_size: int) -> None:
    with pytest.raises(ValueError, match=rf": chunk_size must be at least 1, got {chunk_size}"):
        DOORS[door](torch.sin, chunk_size=chunk_size)


def test_chunk_size_of_vmap() -> None:
    with pytest.raises(ValueError, match=r"^vmap: chunk_size must be at least 1, got 0"):
        jacfunc.vmap(torch.sin, chunk_size=0)
    with pytest.raises(TypeError, match=r"^vmap: chunk_size must be an int or None, got str"):
        jacfunc.vmap(torch.sin, chunk_size="2")


NAMED = pytest.mark.parametrize("door", ["jacobian", "value_and_jacobian", "hessian"])


@NAMED
def test_unknown_strategy(door: str) -> None:
    message = rf"^{door}: strategy must be one of 'auto', .*'structured', got 'backward'\."
    with pytest.raises(ValueError, match=message):
        DOORS[door](torch.sin, strategy="backward")


@NAMED
def test_looped_has_no_chunks(door: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^{door}: strategy 'looped' must have no chunk_size, got 2"
    ):
        DOORS[door](torch.sin, strategy="looped", chunk_size=2)


@NAMED
@pytest.mark.parametrize(
    "strategy", [jacfunc.Reverse, None, 3, torch.sin], ids=["class", "None", "number", "function"]
)
def test_strategy_of_the_wrong_kind(door: str, strategy: Any) -> None:
    message = rf"^{door}: strategy must be a name or an object with materialize\(operator\), got"
    with pytest.raises(TypeError, match=message):
        DOORS[door](torch.sin, strategy=strategy)


@NAMED
def test_chunk_beside_a_strategy_object(door: str) -> None:
    message = rf"^{door}: chunk_size must come with a strategy's name, got 2 beside Reverse"
    with pytest.raises(ValueError, match=message):
        DOORS[door](torch.sin, strategy=jacfunc.Reverse(), chunk_size=2)


@pytest.mark.parametrize("kind", [jacfunc.Reverse, jacfunc.Forward])
def test_chunk_of_a_strategy_object(kind: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"^{kind.__name__}: chunk_size must be at least 1, got 0"
    ):
        kind(chunk_size=0)
    with pytest.raises(TypeError, match=rf"^{kind.__name__}: chunk_size must be an int or None"):
        kind(chunk_size=1.5)


def test_unknown_randomness() -> None:
    message = r"^Forward: randomness must be 'error', 'same' or 'different', got 'random'"
    with pytest.raises(ValueError, match=message):
        jacfunc.Forward(randomness="random")
    with pytest.raises(ValueError, match=message.replace("Forward", "jacfwd")):
        jacfunc.jacfwd(torch.sin, randomness="random")


def test_unknown_direction_of_the_loop() -> None:
    with pytest.raises(ValueError, match=r"^Looped: over must be 'rows' or 'columns', got 'both'"):
        jacfunc.Looped(over="both")


@pytest.mark.parametrize("strategy", [jacfunc.Reverse(), jacfunc.Forward(), jacfunc.Looped()])
def test_strategies_are_values(strategy: Any) -> None:
    assert strategy == type(strategy)()
    assert hash(strategy) == hash(type(strategy)())
    assert isinstance(strategy, jacfunc.Strategy)
    with pytest.raises(AttributeError):
        strategy.chunk_size = 3


# --- what goes in ---


@EVERY_DOOR
def test_complex_input(door: str) -> None:
    message = rf"^{door}: inputs must be real, got torch\.complex64 at args\[0\]\['z'\]\. Diff"
    with pytest.raises(NotImplementedError, match=message):
        DOORS[door](lambda tree: tree["z"].abs())({"z": torch.ones(2, dtype=torch.complex64)})


@EVERY_DOOR
@pytest.mark.parametrize(
    ("arg", "kind"),
    [
        (torch.tensor([1, 2]), r"torch\.int64"),
        (torch.tensor(True), r"torch\.bool"),
        (1.5, "float"),
        ({"a": 1, "b": "x"}, "int, str"),
    ],
    ids=["int64", "bool", "float", "tree"],
)
def test_nothing_to_differentiate(door: str, arg: Any, kind: str) -> None:
    message = rf"^{door}: argument 1 must hold at least one floating point tensor .*, got {kind}\."
    with pytest.raises(TypeError, match=message):
        DOORS[door](lambda x, y: x, 1)(X, arg)


# --- what comes out ---


@EVERY_DOOR
def test_output_that_is_no_tensor(door: str) -> None:
    with pytest.raises(
        TypeError, match=rf"^{door}: func must return tensors, got float at output\[1\]"
    ):
        DOORS[door](lambda x: (x, 1.0))(X)


@EVERY_DOOR
def test_complex_output(door: str) -> None:
    message = rf"^{door}: outputs must be real, got torch\.complex64 at output\."
    with pytest.raises(NotImplementedError, match=message):
        DOORS[door](lambda x: torch.complex(x, x))(X)


@EVERY_DOOR
def test_output_without_a_derivative(door: str) -> None:
    message = rf"^{door}: func must return at least one floating point tensor, got torch\.int64\."
    with pytest.raises(TypeError, match=message):
        DOORS[door](lambda x: x.argmax())(X)


@EVERY_DOOR
@pytest.mark.parametrize(
    ("returned", "came"),
    [
        (lambda x: x, r"torch\.float32"),
        (lambda x: (x,), "a tuple of 1"),
        (lambda x: [x, x], "list"),
    ],
    ids=["tensor", "tuple", "list"],
)
def test_aux_that_is_missing(door: str, returned: Any, came: str) -> None:
    message = rf"^{door}: with has_aux=True func must return \(output, aux\), got {came}"
    with pytest.raises(TypeError, match=message):
        DOORS[door](returned, has_aux=True)(X)


# --- products ---


@pytest.mark.parametrize(
    ("tangents", "kind", "message"),
    [
        ((X, X), ValueError, r"^jvp: tangents must have 1 tensor leaves, got 2\."),
        ((), ValueError, r"^jvp: tangents must have 1 tensor leaves, got 0\."),
        ((Y,), ValueError, r"^jvp: tangents must match in shape, leaf 0 being \(3,\), got \(2,\)"),
        ((1.0,), ValueError, r"^jvp: tangents must match in shape, .* got float"),
        ((X.double(),), TypeError, r"^jvp: tangents must match in dtype, .* got torch\.float64"),
    ],
    ids=["too_many", "too_few", "shape", "number", "dtype"],
)
def test_tangents_that_do_not_fit(tangents: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        jacfunc.jvp(torch.sin, (X,), tangents)


@pytest.mark.parametrize(
    ("cotangents", "kind", "message"),
    [
        ((X, X), ValueError, r"^vjp: cotangents must have 1 tensor leaves, got 2\."),
        (Y, ValueError, r"^vjp: cotangents must match in shape, leaf 0 being \(3,\), got \(2,\)"),
        (X.double(), TypeError, r"^vjp: cotangents must match in dtype, .* got torch\.float64"),
    ],
    ids=["too_many", "shape", "dtype"],
)
def test_cotangents_that_do_not_fit(cotangents: Any, kind: type[Exception], message: str) -> None:
    _, pullback = jacfunc.vjp(torch.sin, X)
    with pytest.raises(kind, match=message):
        pullback(cotangents)


# --- refusals, and errors that are not ours ---


def test_a_refusal_says_what_to_do() -> None:
    func = lambda x: torch.cdist(x, x + 1)  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"^jacfwd: .*no forward mode.*strategy='auto'"):
        jacfunc.jacfwd(func)(torch.randn(3, 2))
    with pytest.raises(NotImplementedError, match=r"^jvp: .*no forward mode"):
        jacfunc.jvp(func, (torch.randn(3, 2),), (torch.randn(3, 2),))


def test_a_refusal_is_told_once() -> None:
    """Nested transforms do not wrap each other's refusal."""
    nested = jacfunc.jacfwd(jacfunc.jacfwd(lambda x: torch.cdist(x, x + 1)))
    with pytest.raises(NotImplementedError) as caught:
        nested(torch.randn(3, 2))
    assert str(caught.value).count("got a refusal") == 1
    assert ".." not in str(caught.value)


@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped", "auto"])
def test_errors_of_func_pass_through(strategy: str) -> None:
    class OwnError(Exception):
        pass

    def func(x: Any) -> Any:
        raise OwnError("of my own")

    with pytest.raises(OwnError, match="of my own"):
        jacfunc.jacobian(func, strategy=strategy)(X)


@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped", "auto"])
def test_mistakes_in_func_stay_torchs_errors(strategy: str) -> None:
    with pytest.raises(RuntimeError, match="must match the size") as caught:
        jacfunc.jacobian(lambda x: x + Y, strategy=strategy)(X)
    assert not isinstance(caught.value, NotImplementedError)


@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped", "auto"])
def test_a_refused_call_leaves_torch_as_it_was(strategy: str) -> None:
    """A sweep that fails leaves no functorch level and no mode behind."""
    with pytest.raises(RuntimeError):
        jacfunc.jacobian(lambda x: x + Y, strategy=strategy)(X)
    assert torch._C._functorch.peek_interpreter_stack() is None
    assert torch.is_grad_enabled()
    assert torch.equal(jacfunc.jacobian(torch.square, strategy=strategy)(X), 2 * torch.eye(3))


@pytest.mark.parametrize("strategy", ["auto", "autotune", jacfunc.Plan(jacfunc.Forward(), "mine")])
def test_where_the_strategy_chooses_nobody_is_told_to_let_it_choose(strategy: Any) -> None:
    message = r"^jacobian: .*Use other operations: no strategy is left to try\.$"
    func = lambda x: torch.special.airy_ai(x)  # noqa: E731 (torch has no derivative of it)
    with pytest.raises(NotImplementedError, match=message):
        jacfunc.jacobian(func, strategy=strategy)(X)


@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped", jacfunc.Reverse(2)])
def test_where_the_user_chose_auto_is_named(strategy: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"Let jacobian\(strategy='auto'\) choose"):
        jacfunc.jacobian(lambda x: torch.special.airy_ai(x), strategy=strategy)(X)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
@pytest.mark.parametrize("door", [*DOORS, "gram", "jvp", "vjp"])
def test_nothing_has_results_without_entries(door: str, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    if door == "jvp":
        _, found = jacfunc.jvp(torch.sin, (x,), (x,))
        expected: tuple[int, ...] = shape
    elif door == "vjp":
        (found,) = jacfunc.vjp(torch.sin, x)[1](x)
        expected = shape
    elif door == "gram":
        found, expected = jacfunc.gram(torch.sin)(x), shape * 2
    else:
        result = DOORS[door](torch.sin)(x)
        found = result[1] if door == "value_and_jacobian" else result
        expected = shape * (3 if door == "hessian" else 2)
    assert tuple(found.shape) == expected


def test_a_gramian_by_parameters_without_entries_is_zero() -> None:
    assert torch.equal(jacfunc.gram(lambda x: x.sum(1))(torch.ones(3, 0)), torch.zeros(3, 3))


@EVERY_DOOR
def test_a_result_larger_than_the_machine_is_refused_before_it_fills_the_memory(door: str) -> None:
    """The sweeps would fill the memory in chunks that fit, and only then ask for the result."""
    many = torch.ones(1).expand(2**24)
    with PeakBytes() as counter, pytest.raises(RuntimeError, match=rf"^{door}: .*a result of "):
        DOORS[door](lambda x: (2 * x) if door != "hessian" else x.square().sum())(many)
    assert counter.peak < 8 * many.numel() * 4


def test_an_error_of_the_allocator_keeps_its_words() -> None:
    words = r"^jacrev: .* must fit into memory, got .*memory.* bytes.*\. Take it in chunks"
    with pytest.raises(RuntimeError, match=words):
        jacfunc.jacrev(lambda x: x.sum() + torch.empty(2**48))(X)
