"""The benchmark's questions on networks: who takes part, that they are right, what is claimed.

Cases run for one round each: here nobody is timed, everyone is judged, and what can be counted is
counted. Other libraries are not installed where these tests run, or need not be.
"""

from __future__ import annotations

import pickle
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.cases import ANSWER, Case
from benchmarks.contestants import by_hand, kernels, per_sample
from benchmarks.problems.judge import reference
from benchmarks.problems.networks import CLASSES, NETWORKS, PIXELS, build, noisy, parts
from benchmarks.questions import (
    buffer,
    ggn_diagonal,
    ggn_product,
    growth,
    hvp,
    inputs,
    norms,
    ntk,
    params,
    streams,
    whole,
)
from benchmarks.questions.growth import Point
from jacfunc._measuring.results import Result
from jacfunc._measuring.rounds import Contestant
from jacfunc.compare import Problem
from tests.benchmarks.once import learnt, measured

QUESTIONS = tuple(
    file.QUESTION
    for file in (
        *(params, inputs, whole, ntk, norms, ggn_diagonal, ggn_product, hvp),
        *(buffer, streams, growth),
    )
)
CASES = {f"{question.name}/{case.name}": case for question in QUESTIONS for case in question.cases}
QUICK = [name for name, case in CASES.items() if case.is_quick]
CPU = torch.device("cpu")

SMALL = (
    *("inputs/resnet, B=64", "params/vit, B=8", "inputs/transformer, B=8", "whole/mlp, B=1"),
    *("ntk/mlp of 536k, B=64", "ntk/gru, B=64", "ggn-diagonal/transformer, B=64"),
    *("ggn-product/lenet, B=64", "hvp/lenet, B=64", "buffer/lenet, B=64"),
)
SMALLER = ("params/mlp, B=8", "params/cnn, B=8", "inputs/resnet, B=8")
"""Quick ones that would take seconds."""

REFUSED = {
    ("inputs/transformer, B=8", "vmap(jacfwd)"): "forward AD with _scaled_dot_product_flash",
    ("ntk/gru, B=64", kernels.MATMUL): "shape",
    ("ntk/gru, B=64", by_hand.FACTORS): "all inputs have to be Tensors",
}
"""What torch cannot do, and says."""


def small(name: str, batch: int = 2) -> Case:
    """The same contestants and judge."""
    network, wrt = name.partition("/")[2].rpartition(", ")[0], name.partition("/")[0]
    batch = 1 if wrt == "whole" else batch
    wrt, per_sample = "inputs" if wrt == "inputs" else "params", wrt != "whole"
    setup = partial(noisy, network, batch, wrt, per_sample=per_sample)
    return replace(CASES[name], setup=setup)


def installed(name: str) -> None:
    if "vit" in name:
        pytest.importorskip("transformers", reason="the extra test-hf is not installed")


def assert_right(name: str, results: dict[str, Result]) -> None:
    for contestant, result in results.items():
        if result.family in ("rival", "JAX"):
            assert result.status.startswith(("ok", "not installed: ", "unsupported: "))
        elif (name, contestant) in REFUSED:
            assert result.status.startswith("unsupported: ")
            assert REFUSED[name, contestant] in result.status
        else:
            assert result.ok, (contestant, result.status)
            assert result.error is not None or result.family == "bound"
            assert result.peak_bytes is not None


@pytest.mark.parametrize("name", [*QUICK, *SMALL])
def test_everyone_gives_the_right_answer_or_says_why_not(name: str, device: str) -> None:
    installed(name)
    case = small(name) if name in (*SMALL, *SMALLER) else CASES[name]
    assert_right(name, measured(case, device))


BY_HAND = {
    (question.name, case.setup.args[0], case.dtype): case
    for question in QUESTIONS
    for case in question.cases
    if case.by_hand
}
"""A case for each network: with few samples those of one network are the same."""


@pytest.mark.parametrize("key", BY_HAND, ids=" ".join)
def test_who_is_beside_the_best_by_hand_is_right(key: tuple[str, str, str], device: str) -> None:
    installed(key[1])
    case = BY_HAND[key].by_hand
    assert case is not None
    network, batch, *rest = case.setup.args
    few = partial(case.setup.func, network, min(batch, 2), *rest, **case.setup.keywords)
    assert_right(case.name, measured(learnt(replace(case, setup=few, threads=1)), device))


@pytest.mark.parametrize("name", ["params/mlp, B=8", "ntk/lenet, B=8", "ggn-product/lenet, B=64"])
def test_a_judge_can_be_sent_to_another_process(name: str) -> None:
    """Answers are judged in a process of its own."""
    problem = small(name).setup(CPU)
    assert pickle.loads(pickle.dumps(CASES[name].check(problem)))
    point = Point(batch=3, width=8, classes=4).problem(CPU)
    assert pickle.loads(pickle.dumps(growth.QUESTION.cases[0].check(point)))


@pytest.mark.parametrize("axis", ["batch", "parameters", "classes"])
def test_growth_is_judged_at_every_size(axis: str, device: str) -> None:
    first = next(case for case in growth.QUESTION.cases if case.axis == axis)
    point = Point(batch=3, width=8, classes=4)
    assert_right("ntk-growth", measured(replace(first, setup=point.problem), device))


def test_one_quick_case_of_each_kind() -> None:
    assert [
        *("params/mlp, B=8", "params/cnn, B=8", "inputs/resnet, B=8"),
        *("ntk/lenet, B=8", "ggn-diagonal/lenet, B=16"),
    ] == QUICK


# --- what is wrong is found ---


def by_recipe(problem: Problem) -> Any:
    return next(c for c in per_sample.PARAMS if c.name == per_sample.RECIPE).prepare(problem)


def off_in_one_entry(problem: Problem) -> Any:
    def run() -> Any:
        blocks = by_recipe(problem)()
        blocks["1.weight"][1, 2, 3, 4] += 1.0
        return blocks

    return run


def transposed(problem: Problem) -> Any:
    return lambda: {name: block.transpose(0, 1) for name, block in by_recipe(problem)().items()}


def without_bias(problem: Problem) -> Any:
    return lambda: {n: block for n, block in by_recipe(problem)().items() if "bias" not in n}


def backwards(problem: Problem) -> Any:
    """Flat, its columns in the opposite order of the parameters."""
    return lambda: torch.cat([b.flatten(2) for b in [*by_recipe(problem)().values()][::-1]], -1)


def cut(problem: Problem) -> Any:
    return lambda: torch.cat([b.flatten(2) for b in by_recipe(problem)().values()], -1)[..., 1:]


@pytest.mark.parametrize(
    ("prepare", "status"),
    [
        (off_in_one_entry, r"wrong: relative error"),
        (transposed, r"wrong: 1.weight has shape (10, 2, 224, 784), not (2, 10, 224, 784)"),
        (without_bias, r"wrong: names ['1.weight', '3.weight', '5.weight'] instead of"),
        (backwards, r"wrong: relative error"),
        (cut, r"wrong: it has shape (2, 10, 228489), not (2, 10, 228490)"),
    ],
)
def test_a_wrong_block_is_a_result(prepare: Any, status: str, device: str) -> None:
    contestants = (Contestant("wrong", "jacfunc", prepare), Contestant("right", "", by_recipe))
    results = measured(replace(small("params/mlp, B=8"), contestants=contestants), device)
    assert results["wrong"].status.startswith(status)
    assert not results["wrong"].seconds
    assert results["right"].ok


def test_a_wrong_kernel_is_found(device: str) -> None:
    def prepare(problem: Problem) -> Any:
        run = kernels.by_matmul(problem)
        return lambda: {by_hand.KERNEL: run()[by_hand.KERNEL].transpose(-1, -2) * 1.001}

    for case in (small("ntk/lenet, B=8"), growth.QUESTION.cases[0]):
        wrong = replace(case, contestants=(Contestant("wrong", "jacfunc", prepare),))
        assert measured(wrong, device)["wrong"].status.startswith("wrong: relative error")


# --- who is not there ---


def test_an_absent_library_leaves_a_row(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    absent = {"laplace": "Laplace", "opacus": "Opacus", "backpack": "BackPACK"}
    for package in (*absent, "torchjd"):
        monkeypatch.setitem(sys.modules, package, None)
    case = small("params/mlp, B=8")
    some = [c for c in case.contestants if c.family in ("rival", "torch.func")]
    results = measured(replace(case, contestants=tuple(some)), device)
    for contestant in (*absent.values(), "TorchJD", "TorchJD, looped"):
        assert results[contestant].status.startswith("not installed: ")
    assert results[per_sample.RECIPE].ok


def test_a_network_of_an_absent_library_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="transformers"):
        CASES["params/vit, B=8"].setup(CPU)


@pytest.mark.parametrize("table", [per_sample.PARAMS, per_sample.WHOLE, per_sample.INPUTS])
def test_nobody_leaves_traces_on_the_model(table: tuple[Contestant[Problem], ...]) -> None:
    wrt = "inputs" if table is per_sample.INPUTS else "params"
    problem = noisy("mlp", 1, wrt, CPU, per_sample=table is not per_sample.WHOLE)
    model, images = parts(problem)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for contestant in table:
        with suppress(ModuleNotFoundError):
            contestant.prepare(problem)()
        assert not any(module.training for module in model.modules()), contestant.name
        for module in model.modules():
            assert not module._forward_hooks | module._backward_hooks, contestant.name
        for name, param in model.named_parameters():
            assert param.grad is None, contestant.name
            assert torch.equal(param, before[name]), contestant.name
    assert not images.requires_grad


# --- what is said of sizes, costs and targets ---


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_as_large_as_is_said(name: str) -> None:
    installed(name)
    model = build(name)
    assert sum(param.numel() for param in model.parameters()) == NETWORKS[name].parameters
    assert model(torch.randn(3, 1, PIXELS, PIXELS)).shape == (3, CLASSES)
    assert not any(module.training for module in model.modules())
    for own, again in zip(model.parameters(), build(name).parameters(), strict=True):
        assert torch.equal(own, again)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_every_parameter_of_a_network_counts(name: str) -> None:
    installed(name)
    for block in reference(noisy(name, 2, "params", CPU)).values():
        assert block.abs().amax(-1).max() > 1e-6


@pytest.mark.parametrize("name", ["params/cnn, B=8", "inputs/resnet, B=8", "whole/mlp, B=1"])
def test_answers_have_the_bytes_that_are_said(name: str) -> None:
    case = CASES[name]
    problem = case.setup(CPU)
    ours = next(c for c in case.contestants if c.name == per_sample.OURS)
    answer = ours.prepare(problem)()
    assert sum(block.nbytes for block in answer.values()) == case.sizes[ANSWER]
    assert {block.shape[:2] for block in answer.values()} == {
        (case.sizes["batch"], case.sizes["classes"])
    }


def test_points_of_growth_are_as_large_as_is_said() -> None:
    for case in growth.QUESTION.cases:
        model, images = parts(case.setup(CPU))
        assert sum(param.numel() for param in model.parameters()) == case.sizes["parameters"]
        assert len(images) == case.sizes["batch"]
        assert model(images[:1]).shape[1] == case.sizes["classes"]
        assert case.name.endswith(f" = {case.sizes[case.axis]:,}")


class Operations(TorchDispatchMode):
    """Counts as FlopCounterMode does, whose hooks on modules fail inside vmap."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize(
    "ways", [(kernels.by_jacfunc, growth.by_factors), (kernels.by_matmul, growth.by_rows)]
)
def test_the_work_that_theory_counts_is_done(ways: tuple[Any, Any], device: str) -> None:
    prepare, count = ways
    point = Point(batch=16, width=64, classes=5)
    run = prepare(point.problem(torch.device(device)))
    for _ in range(2):  # the first two calls look whether samples depend on each other
        run()
    with Operations() as counter:
        run()
    assert counter.total == pytest.approx(count(point), rel=0.15)


def test_forecasts_of_one_call_stand_beside_what_was_counted() -> None:
    case = CASES["whole/mlp, B=1"]
    names = {f"jacfunc {name}" for name in per_sample.STRATEGIES}
    told = tuple(c for c in case.contestants if c.name in names)
    for result in measured(replace(case, contestants=told), "cpu").values():
        assert result.forecast_bytes is not None
        # the copies that a module is lent stay until the last pullback; those of a function do not
        assert result.peak_bytes == pytest.approx(result.forecast_bytes, rel=0.1)


def test_names_are_unique() -> None:
    assert len(CASES) == sum(len(question.cases) for question in QUESTIONS)
    for case in CASES.values():
        names = [contestant.name for contestant in case.contestants]
        assert len(set(names)) == len(names)


def test_everyone_who_is_spoken_of_takes_part() -> None:
    for question in QUESTIONS:
        for case in question.cases:
            names = {contestant.name for contestant in case.contestants}
            assert {question.ours, case.baseline} <= names
            for wanted in case.wanted:
                assert {wanted.of, *wanted.others} <= names | {ANSWER}
