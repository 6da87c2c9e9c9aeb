"""Options of ``module_jacobian``: what it differentiates by, and the form of the result."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import jacfunc
from jacfunc._memory.counting import PeakBytes
from tests.modules.test_modules import MODULES, case, per_sample_reference, reference

STRATEGIES = ("auto", "reverse", "looped", "forward")


class TwoHeads(nn.Module):
    """Two outputs of different shapes, in a dict; a dict of inputs, one of them not floating."""

    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(5, 3), nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, batch, scale=None):
        hidden = torch.tanh(self.body(self.table(batch["token"]) + batch["shift"]))
        scores = self.head(hidden) if scale is None else self.head(hidden) * scale
        return {"hidden": hidden, "scores": scores}


@pytest.fixture
def heads():
    torch.manual_seed(0)
    batch = {"token": torch.tensor([0, 3, 4]), "shift": torch.randn(3, 3).double()}
    return TwoHeads().double(), batch


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["mlp", "cnn", "twice", "batch norm"])
def test_flat_is_the_reference_as_a_matrix(name, strategy):
    module, x = case(name)
    params, _ = reference(module, x)
    want = torch.cat([block.flatten(2).flatten(0, 1) for block in params.values()], -1)
    actual = jacfunc.module_jacobian(module, flat=True, strategy=strategy)(x)
    torch.testing.assert_close(actual, want)
    each, _ = per_sample_reference(module, x)
    want = torch.cat([block.flatten(2) for block in each.values()], -1)
    actual = jacfunc.module_jacobian(module, flat=True, per_sample=True, strategy=strategy)(x)
    torch.testing.assert_close(actual, want)
    for name, columns in jacfunc.param_slices(module).items():
        torch.testing.assert_close(actual[..., columns], each[name].flatten(2))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_flat_of_several_outputs_in_parameters_and_inputs(heads, strategy):
    module, batch = heads
    ways = {"wrt": ("params", "inputs"), "per_sample": True, "strategy": strategy}
    tree = jacfunc.module_jacobian(module, **ways)(batch)
    matrix = jacfunc.module_jacobian(module, **ways, flat=True)(batch)
    assert matrix.shape == (3, 4 + 2, 5 * 3 + 16 + 10 + 3)
    rows = [
        torch.cat([b.flatten(2) for b in (*params.values(), inputs["shift"])], -1)
        for params, inputs in tree.values()
    ]
    torch.testing.assert_close(matrix, torch.cat(rows, 1))


def test_param_slices_follow_the_selection():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    assert jacfunc.param_slices(module, "1.*") == {"1.weight": slice(0, 3), "1.bias": slice(3, 4)}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_another_dtype(flat, per_sample, strategy):
    module, x = case("mlp")
    ways = {"flat": flat, "per_sample": per_sample, "strategy": strategy}
    want = jacfunc.module_jacobian(module, **ways)(x)
    actual = jacfunc.module_jacobian(module, **ways, dtype=torch.float32)(x)
    for block, expected in zip(blocks_of(actual), blocks_of(want), strict=True):
        assert block.dtype == torch.float32
        torch.testing.assert_close(block, expected.float())


def blocks_of(jac):
    return [jac] if isinstance(jac, Tensor) else list(jac.values())


def test_another_device_of_the_same_kind():
    module, x = case("mlp")
    actual = jacfunc.module_jacobian(module.float(), per_sample=True, device="meta")(x.float())
    assert {block.device.type for block in actual.values()} == {"meta"}


@pytest.mark.parametrize("flat", [False, True])
def test_a_flat_result_can_be_differentiated_when_asked(flat):
    module, x = case("mlp")
    module.requires_grad_(True)
    jac = jacfunc.module_jacobian(module, per_sample=True, flat=flat, create_graph=True)(x)
    loss = sum(block.square().sum() for block in blocks_of(jac))
    weight = next(module.parameters())
    (actual,) = torch.autograd.grad(loss, weight)
    eps, change = 1e-6, torch.randn_like(weight)
    values = []
    for step in (eps, -eps):
        moved = copy.deepcopy(module)
        with torch.no_grad():
            next(moved.parameters()).add_(step * change)
        jac = jacfunc.module_jacobian(moved, per_sample=True)(x)
        values.append(sum(block.square().sum() for block in jac.values()))
    torch.testing.assert_close((actual * change).sum(), (values[0] - values[1]) / (2 * eps))


class Count(nn.Module):
    """Counts its calls, as something outside would."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, [0]

    def forward(self, x):
        calls.append(1)
        return self.inner(x)


calls: list[int] = []


@pytest.mark.parametrize("per_sample", [False, True])
def test_full_output_takes_no_other_evaluation(per_sample):
    inner, x = case("batch norm")
    module = Count(inner)
    # at the second and fourth call it is looked at whether samples depend on each other
    ways = {"per_sample": per_sample, "strategy": "reverse", "independent": True}
    plain = jacfunc.module_jacobian(module, **ways)
    full = jacfunc.module_jacobian(module, **ways, full_output=True)
    plain(x), full(x)
    calls.clear()
    want = plain(x)
    alone = len(calls)
    calls.clear()
    actual = full(x)
    assert len(calls) == alone == 1
    assert isinstance(actual, jacfunc.ModuleResult)
    torch.testing.assert_close(actual.jacobian, want)
    torch.testing.assert_close(actual.outputs, module(x))
    assert not actual.outputs.requires_grad


def test_buffers_are_those_of_a_training_step():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).double()
    x, before = torch.randn(6, 4).double(), copy.deepcopy(module.state_dict())
    actual = jacfunc.module_jacobian(module, full_output=True)(x)
    torch.testing.assert_close(dict(module.state_dict()), dict(before))
    module(x)
    assert list(actual.buffers) == [name for name, _ in module.named_buffers()]
    torch.testing.assert_close(actual.buffers, dict(module.named_buffers()))


# --- choosing ---


def test_parameters_by_predicate_and_by_dict():
    module, x = case("mlp")
    every = jacfunc.module_jacobian(module)(x)
    vectors = jacfunc.module_jacobian(module, select=lambda name, param: param.dim() == 1)(x)
    assert list(vectors) == ["0.bias", "2.bias"]
    torch.testing.assert_close(vectors, {name: every[name] for name in vectors})
    part = {"2.weight": module[2].weight, "0.bias": module[0].bias}
    actual = jacfunc.module_jacobian(module, select=part)(x)
    assert list(actual) == ["0.bias", "2.weight"], "in the module's order"
    torch.testing.assert_close(actual, {name: every[name] for name in actual})


def test_a_dict_of_other_values_is_the_point():
    module, x = case("mlp")
    other = copy.deepcopy(module)
    with torch.no_grad():
        other[0].weight.mul_(0.5)
    want = jacfunc.module_jacobian(other, select="0.weight")(x)
    actual = jacfunc.module_jacobian(module, select={"0.weight": other[0].weight.detach()})(x)
    torch.testing.assert_close(actual, want)


@pytest.mark.parametrize(
    ("select", "words"),
    [
        (lambda name, param: False, "a predicate that holds for none of the 4"),
        ({"0.wieght": torch.ones(5, 4)}, "got '0.wieght'. Nearest names: 0.weight"),
        ({"0.weight": torch.ones(4, 5)}, r"got shape (4, 5) for 0.weight, which has (5, 4)"),
        ({"0.weight": None}, "got None for 0.weight"),
        ({}, "at least one parameter, got an empty dict"),
        ("0.wieght", "got '0.wieght'. Nearest names: 0.weight"),
    ],
)
def test_selections_that_fit_nothing(select, words):
    module, x = case("mlp")
    with pytest.raises(ValueError, match=re.escape(words)):
        jacfunc.module_jacobian(module, select=select)(x)
    with pytest.raises(ValueError, match="param_slices: select must"):
        jacfunc.param_slices(module, select)


class Weighted(nn.Module):
    def forward(self, x, pair, scale=1.0, mask=None):
        y = x.sin() * pair["a"] + pair["b"][0] * scale
        return y if mask is None else y * mask


@pytest.fixture
def weighted():
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(shape).double()  # noqa: E731
    x, a, b, scale, mask = draw(2, 3), draw(2, 3), draw(2, 3), draw(2, 3), draw(2, 3)
    return x, {"a": a, "b": (b,)}, scale, mask


def diagonal(values):
    return torch.diag(values.flatten()).view(*values.shape, *values.shape)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inputs_by_position_name_and_path(weighted, strategy):
    x, pair, scale, mask = weighted

    def jac(inputs, *args, **kwargs):
        derive = jacfunc.module_jacobian(Weighted(), "inputs", inputs=inputs, strategy=strategy)
        return derive(*args, **kwargs)

    by_x = diagonal(x.cos() * pair["a"] * mask)
    by_b, by_scale = diagonal(scale * mask), diagonal(pair["b"][0] * mask)
    named = {"scale": scale, "mask": mask}
    torch.testing.assert_close(jac(0, x, pair, **named), by_x)
    torch.testing.assert_close(jac("x", x, pair, **named), by_x)
    torch.testing.assert_close(jac("scale", x, pair, **named), by_scale)
    torch.testing.assert_close(jac("scale", x, pair, scale, mask), by_scale)
    actual = jac(("mask", "pair['b']", -4 + 2), x, pair, **named)
    assert len(actual) == 3
    torch.testing.assert_close(actual[0], diagonal(x.sin() * pair["a"] + pair["b"][0] * scale))
    assert actual[1]["a"] is None
    torch.testing.assert_close(actual[1]["b"][0], by_b)
    torch.testing.assert_close(actual[2], by_x)
    both = jac(("pair['a']", "pair['b'][0]"), x, pair, **named)
    torch.testing.assert_close(both[0]["a"], diagonal(x.sin() * mask))
    torch.testing.assert_close(both[1]["b"][0], by_b)
    starred = jac("pair[*][0]", x, pair, **named)
    assert starred["a"] is None
    torch.testing.assert_close(starred["b"][0], by_b)


def test_a_call_by_keywords_alone_is_differentiated_by_all(weighted):
    x, pair, *_ = weighted
    actual = jacfunc.module_jacobian(Weighted(), "inputs")(x=x, pair=pair)
    assert list(actual) == ["x", "pair"]
    torch.testing.assert_close(actual["x"], diagonal(x.cos() * pair["a"]))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (3, "got 3. There are 0, 1, 'mask'"),
        ("masc", "got 'masc'. There are 0, 1, 'mask'"),
        ("pair['c']", "got \"pair['c']\". There are"),
    ],
)
def test_inputs_that_are_not_there(weighted, inputs, words):
    x, pair, _, mask = weighted
    with pytest.raises(ValueError, match=re.escape("module_jacobian: inputs must be")) as caught:
        jacfunc.module_jacobian(Weighted(), "inputs", inputs=inputs)(x, pair, mask=mask)
    assert words in str(caught.value)


# --- samples ---


class Biased(nn.Module):
    """A table that all samples share, and steps ``[T, B, 2]`` of each sample's own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, table, steps=None):
        y = torch.tanh(self.layer(x)) @ table
        return y if steps is None else y * steps.sum(0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_in_dims_of_every_input(strategy):
    torch.manual_seed(0)
    module = Biased().double()
    x, table, steps = torch.randn(4, 3), torch.randn(2, 2), torch.randn(5, 4, 2)
    x, table, steps = x.double(), table.double(), steps.double()
    singles = [
        jacfunc.module_jacobian(module, ("params", "inputs"), strategy="looped")(
            x[b : b + 1], table, steps[:, b : b + 1]
        )
        for b in range(4)
    ]
    want = torch.stack([params["layer.weight"][0] for params, _ in singles])
    derive = jacfunc.module_jacobian(
        module, ("params", "inputs"), per_sample=True, in_dims=(0, None, 1), strategy=strategy
    )
    params, (by_x, by_table, by_steps) = derive(x, table, steps)
    torch.testing.assert_close(params["layer.weight"], want)
    torch.testing.assert_close(by_x, torch.stack([inputs[0][0][:, 0] for _, inputs in singles]))
    torch.testing.assert_close(by_table, torch.stack([inputs[1][0] for _, inputs in singles]))
    by_one = torch.stack([inputs[2][0][..., 0, :] for _, inputs in singles])
    torch.testing.assert_close(by_steps, by_one)
    by_name = jacfunc.module_jacobian(
        module, per_sample=True, in_dims={"table": None, "steps": 1}, strategy=strategy
    )
    torch.testing.assert_close(by_name(x, table=table, steps=steps)["layer.weight"], want)


@pytest.mark.parametrize(
    ("in_dims", "error", "words"),
    [
        ((0,), ValueError, "one entry for each of the 2 inputs, got 1"),
        ({"mast": 0}, ValueError, "given by keyword, got 'mast'"),
        ("0", TypeError, "in_dims must be an int, a tuple"),
        ((0, 5), ValueError, "have the batch in its dimension 5"),
        ((None, None), ValueError, "must have the same batch, got none"),
        (0, ValueError, r"must have the same batch, got \[2, 4\]"),
    ],
)
def test_in_dims_that_do_not_fit(in_dims, error, words):
    derive = jacfunc.module_jacobian(Biased(), per_sample=True, in_dims=in_dims)
    with pytest.raises(error, match=words):
        derive(torch.randn(4, 3), torch.randn(2, 2))


class Centered(nn.Module):
    """Couples the samples of a batch by hand."""

    def __init__(self, p=0.0):
        super().__init__()
        self.layer, self.drop = nn.Linear(3, 2), nn.Dropout(p)

    def forward(self, x):
        y = self.drop(self.layer(x))
        return y - y.mean(0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_samples_that_depend_on_each_other_are_refused(strategy, p):
    torch.manual_seed(0)
    x = torch.randn(3, 3)
    derive = jacfunc.module_jacobian(
        Centered(p), per_sample=True, strategy=strategy, randomness="different"
    )
    with pytest.raises(ValueError, match="samples that do not depend on each other, got a module"):
        derive(x)
    # asked for the batch as a whole, it is a function like any other
    whole = jacfunc.module_jacobian(Centered(), strategy=strategy)(x)
    assert whole["layer.bias"].shape == (3, 2, 2)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_samples_that_do_not_are_not(name):
    module, x = case(name)
    jacfunc.module_jacobian(module.float(), per_sample=True)(x.float())


def test_dropout_does_not_look_like_coupling():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 40), nn.Dropout(0.5), nn.Linear(40, 2))
    for randomness in ("same", "different"):
        jacfunc.module_jacobian(module, per_sample=True, randomness=randomness)(torch.randn(5, 3))


# --- memory ---


@pytest.mark.parametrize("strategy", ["auto", "reverse", "looped"])
def test_a_flat_result_takes_little_beside_itself(strategy):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 10))
    derive = jacfunc.module_jacobian(module, per_sample=True, flat=True, strategy=strategy)
    x = torch.randn(64, 256)
    derive(x)
    with PeakBytes() as counter:
        result = derive(x)
    assert result.shape == (64, 10, 256 * 128 + 128 + 1280 + 10)
    assert counter.peak < 1.25 * result.nbytes


class LastStep(nn.Module):
    """A recurrent layer, and scores of its last state."""

    def __init__(self, kind):
        super().__init__()
        self.read, self.head = kind(28, 48, batch_first=True), nn.Linear(48, 10)

    def forward(self, x):
        return self.head(self.read(x)[0][:, -1])


@pytest.mark.parametrize(("kind", "share"), [(nn.LSTM, 1.46), (nn.RNN, 1.55)])
def test_what_is_merged_of_a_parameter_goes_before_another_is(kind, share):
    """The cotangents of all steps lie beside the blocks of one parameter, and not of all."""
    torch.manual_seed(0)
    derive = jacfunc.module_jacobian(LastStep(kind), per_sample=True)
    x = torch.randn(34 if kind is nn.LSTM else 120, 28, 28)
    with PeakBytes() as counter:
        result = derive(x)
    assert counter.peak < share * sum(block.nbytes for block in result.values())


@pytest.mark.parametrize("strategy", ["reverse", "structured"])
def test_a_small_flat_result_is_swept_at_once(strategy):
    """How large its rows are is known: no row goes ahead to see that."""
    inner, x = case("mlp")
    derive = jacfunc.module_jacobian(inner, flat=True, strategy=strategy)
    derive(x)
    with Operations() as operations:
        derive(x)
    assert operations.names.count("aten::tanh_backward") == 1


class Operations(TorchDispatchMode):
    """Notes the name of every operation."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_samples_of_a_small_flat_result_are_taken_at_once_from_the_second_call_on():
    inner, x = case("batch norm")
    derive = jacfunc.module_jacobian(Count(inner), per_sample=True, flat=True, independent=True)
    derive(x)
    calls.clear()
    derive(x)
    assert len(calls) == 1
