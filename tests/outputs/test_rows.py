"""Rows of the outputs that are asked for, against a loop of ``torch.autograd.grad`` in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import jacfunc
from tests.outputs.choices import CHOICES, MAKERS, Asked, B, Case, case_of, numbered
from tests.truth.doors import STREAMS, matrix, trained, widths_of
from tests.truth.oracles import float_leaves

EVERY_CASE = pytest.mark.parametrize("name", MAKERS)
EVERY_CHOICE = pytest.mark.parametrize("choice", CHOICES)


@cache
def of(name: str, choice: str) -> tuple[Case, Asked]:
    case = case_of(name)
    return case, CHOICES[choice](case)


def rows_of(asked: Asked, jacobian: Tensor) -> Tensor:
    return torch.einsum("brm,bmp->brp", asked.cotangents, jacobian)


def assert_rows(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


STRATEGIES = ("auto", "reverse", "forward", "looped", "structured")


@EVERY_CASE
@EVERY_CHOICE
def test_rows_of_every_sample(name: str, choice: str) -> None:
    case, asked = of(name, choice)
    both = ("params", "inputs")
    rows = rows_of(asked, torch.cat([case.truth.params, case.truth.inputs], 2))
    widths = widths_of(both, case.module, case.inputs)
    for strategy in STRATEGIES:
        jac = jacfunc.module_jacobian(
            case.module, both, per_sample=True, outputs=asked.outputs, strategy=strategy
        )
        assert_rows(matrix(jac(*case.inputs), widths), rows)


@EVERY_CASE
@EVERY_CHOICE
def test_within_a_budget_and_into_a_tensor(name: str, choice: str) -> None:
    case, asked = of(name, choice)
    rows = rows_of(asked, case.truth.params)
    place = torch.zeros_like(rows)
    options: dict[str, Any] = {"flat": True, "per_sample": True, "outputs": asked.outputs}
    for more in ({"memory": "3 MiB"}, {"strategy": "reverse", "chunk_size": 1}, {"out": place}):
        assert_rows(jacfunc.module_jacobian(case.module, **options, **more)(*case.inputs), rows)
    assert_rows(place, rows)
    by_inputs = jacfunc.module_jacobian(case.module, "inputs", **options)(*case.inputs)
    assert_rows(by_inputs, rows_of(asked, case.truth.inputs))


@EVERY_CASE
@EVERY_CHOICE
@pytest.mark.parametrize("by", STREAMS)
def test_streams(name: str, choice: str, by: Any) -> None:
    case, asked = of(name, choice)
    for chunk_size in (None, 1):
        stream = jacfunc.stream_jacobian(
            case.module, by, per_sample=True, outputs=asked.outputs, chunk_size=chunk_size
        )
        blocks = [block for _, block in stream(*case.inputs)]
        widths = widths_of(("params",), case.module, case.inputs)
        assert_rows(STREAMS[by](blocks, widths), rows_of(asked, case.truth.params))


@EVERY_CASE
@EVERY_CHOICE
def test_kernels(name: str, choice: str) -> None:
    case, asked = of(name, choice)
    rows = rows_of(asked, case.truth.params)
    expected = torch.einsum("arp,bsp->abrs", rows, rows)
    params = dict(case.module.named_parameters())

    def of_sample(params: dict[str, Tensor], x: Tensor) -> Any:
        output = functional_call(case.module, params, (x.unsqueeze(0),))
        return {k: v[0] for k, v in output.items()} if isinstance(output, dict) else output[0]

    for options in ({}, {"chunk_size": 2}, {"memory": "4 MiB"}):
        kernel = jacfunc.ntk(
            case.module,
            None,
            case.inputs,
            outputs=asked.outputs,
            **options,  # type: ignore[arg-type]
        )
        assert_rows(kernel, expected)
    if name != "recurrent":  # which vmap refuses
        kernel = jacfunc.ntk(of_sample, params, case.inputs, outputs=asked.outputs)
        assert_rows(kernel, expected)  # type: ignore[arg-type]
    traced = jacfunc.ntk(case.module, None, case.inputs, outputs=asked.outputs, trace_axes=0)
    assert_rows(traced, torch.einsum("abrr->ab", expected))


def test_kernels_of_two_batches() -> None:
    case, asked = of("mlp", "largest")
    more, _ = of("mlp", "numbers")
    first, second = case.inputs[0], case.inputs[0].flip(0)
    kernel = jacfunc.ntk(case.module, None, first, second, outputs=jacfunc.TopK(2))
    rows = rows_of(asked, case.truth.params)
    assert_rows(kernel, torch.einsum("arp,bsp->abrs", rows, rows.flip(0)))
    with pytest.raises(ValueError, match=r"ntk: outputs \[B, R\] must be for the samples of one"):
        jacfunc.ntk(case.module, None, first, second, outputs=torch.zeros(B, 1, dtype=torch.long))
    own = torch.zeros(B, 1, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"ntk: outputs \[B, R, \*out\] must be for the samples"):
        jacfunc.ntk(case.module, None, [first, second], outputs=own)
    shared = jacfunc.ntk(more.module, None, [first], [second], outputs=own[0] + 1)
    row = more.truth.params.sum(1)
    assert_rows(shared[:, :, 0, 0], row @ row.flip(0).T)


@EVERY_CASE
@EVERY_CHOICE
def test_operators(name: str, choice: str) -> None:
    case, asked = of(name, choice)
    rows = rows_of(asked, case.truth.params).flatten(0, 1)
    J = jacfunc.module_operator(case.module, outputs=asked.outputs, per_sample=True)(*case.inputs)
    assert J.shape == rows.shape
    generator = torch.Generator().manual_seed(4)
    v, u = (torch.randn(n, generator=generator, dtype=torch.float64) for n in reversed(rows.shape))
    for _ in range(2):
        assert_rows(J @ v, rows @ v)
        assert_rows(J.T @ u, rows.T @ u)
    assert_rows(J.matrix(), rows)
    if "own" in choice:
        with pytest.raises(ValueError, match=r"module_operator: outputs \[B, R.* of one batch"):
            jacfunc.module_operator(case.module, outputs=asked.outputs, per_sample=True)(
                [case.inputs]
            )
    elif choice != "drawn" and choice != "drawn alike":  # which differ by the number of a sample
        (x,) = case.inputs
        over = jacfunc.module_operator(case.module, outputs=asked.outputs, per_sample=True)
        assert_rows(over([x[:2], x[2:]]) @ v, rows @ v)


def test_an_operator_of_the_call_as_a_whole() -> None:
    case = case_of("heads")
    every = whole_truth(case)
    J = jacfunc.module_operator(case.module, outputs=slice(1, 8, 3))(*case.inputs)
    assert_rows(J.matrix(), every[1:8:3])


# --- of a call as a whole ---


def whole_truth(case: Case) -> Tensor:
    """The Jacobian ``[M, P]`` of all outputs of the call."""
    outputs = float_leaves(case.module(*case.inputs))
    rows = []
    for entry in torch.cat([out.flatten() for out in outputs]):
        grads = torch.autograd.grad(
            entry, trained(case.module), retain_graph=True, materialize_grads=True
        )
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["mlp", "heads"])
def test_rows_of_the_call_as_a_whole(name: str) -> None:
    case = case_of(name)
    every = whole_truth(case)
    leaves = float_leaves(case.module(*case.inputs))
    row = torch.cat([leaf.flatten() for leaf in leaves]).detach()
    asked: dict[Any, Tensor] = {
        (0, 3, -1): every[[0, 3, -1]],
        jacfunc.TopK(3): every[row.topk(3).indices],
        jacfunc.Sampled(3, 1): every[jacfunc.Sampled(3, 1).indices(row.unsqueeze(0))[0]],
    }
    for outputs, expected in asked.items():
        for strategy in STRATEGIES:
            jac = jacfunc.module_jacobian(
                case.module, flat=True, outputs=outputs, strategy=strategy
            )
            assert_rows(jac(*case.inputs), expected)
    sliced = jacfunc.module_jacobian(case.module, outputs=slice(2, 9, 3))(*case.inputs)
    assert sliced.keys() == dict(case.module.named_parameters()).keys()
    flat = torch.cat([block.flatten(1) for block in sliced.values()], 1)
    assert_rows(flat, every[2:9:3])
    names = [name for name, _ in jacfunc.stream_jacobian(case.module, outputs=[1])(*case.inputs)]
    assert names == [*sliced]


def test_cotangents_of_the_call_as_a_whole() -> None:
    case = case_of("mlp")
    cotangents = torch.randn(2, B, 5, dtype=torch.float64)
    jac = jacfunc.module_jacobian(case.module, flat=True, outputs=cotangents)(*case.inputs)
    assert_rows(jac, cotangents.flatten(1) @ whole_truth(case))


# --- what comes beside them ---


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("strategy", ["auto", "reverse", "looped", "structured"])
def test_all_outputs_are_returned_beside_the_rows(per_sample: bool, strategy: str) -> None:
    case = case_of("heads")
    jac = jacfunc.module_jacobian(
        *(case.module,), outputs=[1], per_sample=per_sample, full_output=True, strategy=strategy
    )
    result, output = jac(*case.inputs), case.module(*case.inputs)
    assert result.outputs.keys() == output.keys()
    for name, leaf in output.items():
        torch.testing.assert_close(result.outputs[name], leaf)
    assert result.jacobian["one.bias"].shape == (B, 1, 1) if per_sample else (1, 1)


def test_rows_are_differentiable() -> None:
    case, asked = of("mlp", "own cotangents")
    module = case.module
    jac = jacfunc.module_jacobian(
        module, "inputs", per_sample=True, outputs=asked.outputs, create_graph=True
    )
    jac(*case.inputs).square().sum().backward()
    grads = [param.grad for param in module.parameters()]
    x = case.inputs[0].clone().requires_grad_()
    out, total = module(x), torch.zeros((), dtype=torch.float64)
    for r in range(2):
        (row,) = torch.autograd.grad(out, x, asked.outputs[:, r], create_graph=True)
        total = total + row.square().sum()
    expected = torch.autograd.grad(total, list(module.parameters()), materialize_grads=True)
    for actual, grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(grad) if actual is None else actual, grad)
    module.zero_grad(set_to_none=True)


def test_rows_inside_vmap() -> None:
    case, _ = of("mlp", "numbers")
    batches = torch.stack([case.inputs[0], case.inputs[0].flip(0)])
    for outputs in ([1, -1], torch.tensor([[0, 1]] * B), jacfunc.TopK(2)):
        jac = jacfunc.module_jacobian(case.module, "inputs", per_sample=True, outputs=outputs)
        both = torch.vmap(jac)(batches)
        torch.testing.assert_close(both, torch.stack([jac(batch) for batch in batches]))


def test_samples_elsewhere_than_in_front() -> None:
    gru = nn.GRU(3, 4).double()
    x = torch.randn(5, B, 3, dtype=torch.float64)
    every = jacfunc.module_jacobian(gru, per_sample=True, in_dims=1)(x)[0]
    own = torch.tensor([[0], [7], [-24 + 2]])  # of 20 outputs of all steps, and 4 of the last state
    rows = jacfunc.module_jacobian(gru, per_sample=True, in_dims=1, outputs=own, full_output=True)
    result = rows(x)
    for name, block in every.items():
        flat = block.flatten(1, 2)
        expected = torch.stack([flat[0, [0]], flat[1, [7]], flat[2, [2]]])
        torch.testing.assert_close(result.jacobian[name], expected)
    G = jacfunc.ggn(gru, lambda out, y: (out[0] - y).square().sum(), in_dims=1, outputs=own)
    target = torch.zeros_like(x[..., :1])
    matrix = G(x, target).matrix()
    flat = torch.cat([block.flatten(2) for block in result.jacobian.values()], 2)[:, 0]
    torch.testing.assert_close(matrix, 2 * flat.T @ flat)


def test_no_samples_and_one() -> None:
    case, _ = of("mlp", "numbers")
    x = case.inputs[0]
    for outputs in ([0, 1], jacfunc.TopK(2), torch.zeros(2, 5).double()):
        jac = jacfunc.module_jacobian(case.module, per_sample=True, flat=True, outputs=outputs)
        assert jac(x[:0]).shape == (0, 2, case.truth.params.shape[2])
        torch.testing.assert_close(jac(x[:1]), jac(x)[:1])


def test_each_sample_alone_draws_the_numbers_that_it_draws() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 5)).double()
    x = torch.randn(B, 3, dtype=torch.float64)
    options: dict[str, Any] = {"per_sample": True, "flat": True, "randomness": "same"}
    torch.manual_seed(1)
    every = jacfunc.module_jacobian(model, **options)(x)
    torch.manual_seed(1)
    rows = jacfunc.module_jacobian(model, outputs=[3, 0], **options)(x)
    torch.testing.assert_close(rows, every[:, [3, 0]])
    with pytest.raises(NotImplementedError, match="TopK outputs must be the same each time"):
        jacfunc.module_jacobian(model, outputs=jacfunc.TopK(1), **options)(x)


def test_the_module_and_what_was_asked_for_may_change_after_the_call() -> None:
    case, _ = of("mlp", "numbers")
    numbers = torch.tensor([[0], [1], [2]])
    stream = jacfunc.stream_jacobian(case.module, "params", per_sample=True, outputs=numbers)
    blocks = stream(*case.inputs)
    numbers.zero_()
    bias = dict(blocks)["2.bias"]
    torch.testing.assert_close(bias[:, 0], torch.eye(5, dtype=torch.float64)[:3])


def refusals() -> dict[str, Callable[[], Any]]:
    case = case_of("mlp")

    def jac(outputs: Any, **options: Any) -> Callable[[], Any]:
        made = jacfunc.module_jacobian(case.module, outputs=outputs, **options)
        return lambda: made(*case.inputs)

    each = {"per_sample": True}
    return {
        r"outputs must be numbers from -5 to 4, for 5 outputs, got 5\. Count": jac([5], **each),
        r"from -5 to 4, for 5 outputs, got -6\.": jac(torch.tensor([-6, 7]), **each),
        r"from -5 to 4, for 5 outputs, got 9\.": jac(torch.tensor([[9], [0], [0]]), **each),
        r"from -15 to 14, for 15 outputs, got 15\.": jac([15]),
        r"choose some of the 5 outputs, got slice\(7, None, None\)": jac(slice(7, None), **each),
        r"\[B, R\] must be for 3 samples, got shape \(2, 1\)": jac(
            torch.zeros(2, 1, dtype=torch.long), **each
        ),
        r"\[B, R\] must be for a call with per_sample=True, got shape \(3, 1\)": jac(
            torch.zeros(3, 1, dtype=torch.long)
        ),
        r"cotangents .*here \[R, 5\], got \(2, 4\)\. Give": jac(torch.zeros(2, 4), **each),
        r"cotangents .*here \[R, 5\], got \(5,\)\.": jac(torch.zeros(5), **each),
        r"\[B, R, \*out\] must be for 3 samples, got shape \(2, 1, 5\)": jac(
            torch.zeros(2, 1, 5), **each
        ),
        r"here \[R, 3, 5\], got \(2, 5\)": jac(torch.zeros(2, 5)),
        r"outputs must match|got \(1, 5\), \(1, 5\)": jac((torch.zeros(1, 5),) * 2, **each),
        r"k of TopK must be at most the 5 outputs, got 6": jac(jacfunc.TopK(6), **each),
        r"dim of TopK must be a dimension of one sample's output, got 1 for": jac(
            jacfunc.TopK(1, dim=1), **each
        ),
    }


@pytest.mark.parametrize("words", refusals())
def test_what_does_not_fit_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match=f"module_jacobian: .*{words}"):
        refusals()[words]()


def test_a_choice_of_steps_takes_the_largest_of_each() -> None:
    case = case_of("steps")
    by_step = jacfunc.TopK(2, dim=-1)
    numbers = by_step.indices(case.module(*case.inputs))
    top = case.truth.outputs.view(B, 2, 5).topk(2).indices
    assert torch.equal(numbers, (top + torch.tensor([[0], [5]])).flatten(1))
    jac = jacfunc.module_jacobian(case.module, per_sample=True, flat=True, outputs=by_step)
    asked = numbered(case, by_step, numbers)
    assert_rows(jac(*case.inputs), rows_of(asked, case.truth.params))
    first = jacfunc.TopK(1, dim=0).indices(case.module(*case.inputs))
    expected = case.truth.outputs.view(B, 2, 5).argmax(1) * 5 + torch.arange(5)
    assert torch.equal(first, expected)


def test_draws_follow_the_softmax_and_their_seed() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(20_000, 4)
    draws = jacfunc.Sampled(2, seed=1).indices(logits)
    assert bool((draws[:, 0] != draws[:, 1]).all())
    first = draws[:, 0].bincount(minlength=4) / len(draws)
    chances = logits[0].softmax(0)
    torch.testing.assert_close(first, chances, rtol=0, atol=0.012)
    given = draws[draws[:, 0] == 2, 1].bincount(minlength=4) / (draws[:, 0] == 2).sum()
    rest = chances * (torch.arange(4) != 2)
    torch.testing.assert_close(given, rest / rest.sum(), rtol=0, atol=0.015)
    alike = jacfunc.Sampled(1, seed=1, chances="uniform").indices(logits)
    torch.testing.assert_close(
        alike.flatten().bincount() / len(draws), torch.full((4,), 0.25), rtol=0, atol=0.012
    )
    again = jacfunc.Sampled(2, seed=1).indices(logits[:50])
    assert torch.equal(again, draws[:50])
    assert not torch.equal(jacfunc.Sampled(2, seed=2).indices(logits[:50]), again)
