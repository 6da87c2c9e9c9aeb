"""What results and returned functions look like when they are printed."""

from __future__ import annotations

import torch
from torch import nn

import jacfunc


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_returned_functions_are_named_by_their_door_and_what_they_are_of():
    loss, net = nn.functional.cross_entropy, model()
    doors = {
        "jacrev(sin)": jacfunc.jacrev(torch.sin),
        "jacobian(<lambda>)": jacfunc.jacobian(lambda x: x),
        "hessian(cos)": jacfunc.hessian(torch.cos),
        "vmap(jacfwd(Sequential))": jacfunc.vmap(jacfunc.jacfwd(net)),
        "value_and_jacobian(model)": jacfunc.value_and_jacobian(model),
        "vjp(sin)": jacfunc.vjp(torch.sin, torch.ones(2))[1],
        "gram(sin)": jacfunc.gram(torch.sin),
        "module_jacobian(Sequential)": jacfunc.module_jacobian(net),
        "stream_jacobian(Sequential)": jacfunc.stream_jacobian(net),
        "ggn(Sequential)": jacfunc.ggn(net, loss),
        "fisher(Sequential)": jacfunc.fisher(net, "categorical"),
        "gradient_norms(Sequential)": jacfunc.gradient_norms(net, loss),
        "random_projection(Sequential)": jacfunc.random_projection(net, 8),
    }
    for name, function in doors.items():
        assert repr(function).startswith(f"<function {name} at ")


def test_a_matrix_says_what_it_is_of_in_a_line():
    net = model()
    G = jacfunc.ggn(net, nn.functional.cross_entropy)(torch.ones(5, 3), torch.zeros(5).long())
    said = "GaussNewton(point=<ggn of Sequential, 4 parameters of 26 numbers, 5 samples>)"
    assert repr(G) == said
    G.diagonal()
    assert repr(G) == said


def test_plans_print_as_lines_and_as_a_table():
    plan = jacfunc.plan(torch.sin, torch.zeros(3))
    lines = repr(plan).splitlines()
    assert lines[0] == "Plan:"
    rows = [line.split(maxsplit=1) for line in lines[1:]]
    assert ["strategy", "Reverse(chunk_size=None)"] in rows
    assert ["peak", "108 B"] in rows
    assert max(map(len, lines)) < 100
    page = plan._repr_html_()
    assert "<td>strategy</td><td>Reverse(chunk_size=None)</td>" in page
    assert page.count("<tr>") == len(lines) - 1


def test_explanations_are_a_table_in_a_notebook():
    page = jacfunc.explain(torch.sin, torch.zeros(3))._repr_html_()
    assert "<tr><th></th><th>forecast</th><th>seen</th></tr>" in page
    assert "<td>peak</td><td>108 B</td><td>108 B</td>" in page
