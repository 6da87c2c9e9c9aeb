"""A detached result that seems to be meant for a loss is warned of, and no other."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import jacfunc

SAYS = r"^module_jacobian: create_graph must be True .* got False with {}\. Pass create_graph=True,"
TRAINED = SAYS.format("parameters that were trained since the last call")
FOLLOWED = SAYS.format("an input that was computed with gradients")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))


def steps(model: nn.Module, count: int, wrt: str = "inputs", **options) -> None:
    """Steps of training with the result in the loss."""
    optimizer, x = torch.optim.SGD(model.parameters(), 0.1), torch.randn(3, 2)
    for _ in range(count):
        optimizer.zero_grad()
        jac = jacfunc.module_jacobian(model, wrt, per_sample=True, flat=True, **options)(x)
        (model(x).square().mean() + jac.square().mean()).backward()
        optimizer.step()


@pytest.mark.filterwarnings("always")
def test_a_penalty_that_does_not_train_is_warned_of_from_the_second_step_on(model):
    with warnings.catch_warnings(record=True) as first:
        steps(model, 1)
    assert not first
    with pytest.warns(UserWarning, match=TRAINED) as caught:
        steps(model, 2)
    # the place is the user's own
    assert {warning.filename for warning in caught} == {__file__}


def test_an_input_that_was_computed_with_gradients_is_warned_of(model):
    features = nn.Linear(2, 2)(torch.randn(3, 2))
    for options in ({}, {"wrt": "inputs"}):
        with pytest.warns(UserWarning, match=FOLLOWED):
            jacfunc.module_jacobian(model, per_sample=True, **options)(features)


@pytest.mark.filterwarnings("default")
def test_a_place_is_named_once(model):
    features = nn.Linear(2, 2)(torch.randn(3, 2))
    with warnings.catch_warnings(record=True) as caught:
        for _ in range(3):
            jacfunc.module_jacobian(model)(features)
    assert len(caught) == 1


def test_who_trains_by_the_result_is_not_warned(model):
    steps(model, 3, create_graph=True)


def test_jacobians_in_parameters_are_of_use_in_training_without_a_graph(model):
    steps(model, 3, "params")


def test_who_looks_at_the_result_alone_is_not_warned(model):
    model.eval()
    steps(model, 3)
    model.train()
    features = nn.Linear(2, 2)(torch.randn(3, 2))
    with torch.no_grad():
        quiet = jacfunc.module_jacobian(model, "inputs")(features)
    torch.testing.assert_close(quiet, jacfunc.module_jacobian(model, "inputs")(features.detach()))
    # a leaf was made by the user, maybe out of habit
    jacfunc.module_jacobian(model, "inputs")(torch.randn(3, 2, requires_grad=True))


@pytest.mark.parametrize("door", [jacfunc.jacrev, jacfunc.jacobian, jacfunc.hessian])
def test_inside_another_derivative_a_detached_result_is_refused(model, door):
    inner = jacfunc.module_jacobian(model, "inputs", per_sample=True)
    x = torch.randn(3, 2)
    for _ in range(2):
        says = r"module_jacobian: inside another derivative .* Pass create_graph=True"
        with pytest.raises(NotImplementedError, match=says):
            door(lambda x: inner(x.sin()))(x)


LOSS, TARGETS = nn.MSELoss(), torch.zeros(3, 2)
WITHOUT_A_GRAPH = {
    "ntk": lambda model, x: jacfunc.ntk(model, None, x),
    "gradient_norms": lambda model, x: jacfunc.gradient_norms(model, LOSS)(x, TARGETS),
    "ggn": lambda model, x: jacfunc.ggn(model, LOSS)(x, TARGETS).diagonal()["0.bias"],
    "random_projection": lambda model, x: jacfunc.random_projection(model, 4)(x),
    "stream_jacobian": lambda model, x: next(jacfunc.stream_jacobian(model, "rows")(x))[1][
        "0.bias"
    ],
    "module_operator": lambda model, x: jacfunc.module_operator(model)(x).matrix(),
    "module_hessian": lambda model, x: jacfunc.module_hessian(model, LOSS)(x, TARGETS).gradient()[
        "0.bias"
    ],
}


@pytest.mark.parametrize("name", WITHOUT_A_GRAPH)
@pytest.mark.parametrize("strategy", ["auto", "reverse", "looped"])
def test_doors_whose_results_have_no_graph_are_refused_inside_a_derivative(model, name, strategy):
    """It would be zero without a word."""
    call, x = WITHOUT_A_GRAPH[name], torch.randn(3, 2)
    for _ in range(2):
        says = f"{name}: inside another derivative the result must keep its graph"
        with pytest.raises(NotImplementedError, match=says):
            jacfunc.jacobian(lambda x: call(model, x), strategy=strategy)(x)
    jac = jacfunc.jacobian(lambda x: x + call(model, x.detach()).sum(), strategy=strategy)(x)
    assert torch.equal(jac.view(6, 6), torch.eye(6))


def test_with_a_graph_the_derivative_is_the_second_one():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(1, 2, dtype=torch.float64)
    inner = jacfunc.module_jacobian(model, "inputs", flat=True, create_graph=True)
    expected = torch.func.hessian(lambda x: model(x[None])[0])(x[0])
    torch.testing.assert_close(jacfunc.jacrev(inner)(x)[:, :, 0], expected)
