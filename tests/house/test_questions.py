"""What people ask for most, each as its answer."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import jacfunc


def test_elementwise_square_and_sine():
    x = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(jacfunc.jacobian(torch.square)(x), torch.diag(2 * x))
    torch.testing.assert_close(jacfunc.jacobian(torch.sin)(x), torch.diag(torch.cos(x)))


def test_matrix_product_has_a_four_dimensional_jacobian():
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    b = torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    eye = torch.eye(2)
    by_a, by_b = jacfunc.jacobian(torch.mm, argnums=(0, 1))(a, b)
    torch.testing.assert_close(by_a, torch.einsum("ik,lj->ijkl", eye, b))
    torch.testing.assert_close(by_b, torch.einsum("ik,jl->ijkl", a, eye))
    printed = """\
tensor([[[[5., 7.],
          [0., 0.]],

         [[6., 8.],
          [0., 0.]]],


        [[[0., 0.],
          [5., 7.]],

         [[0., 0.],
          [6., 8.]]]])"""
    assert str(by_a) == printed


def test_matrix_square():
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    eye = torch.eye(2)
    expected = torch.einsum("ik,lj->ijkl", eye, a) + torch.einsum("ik,jl->ijkl", a, eye)
    actual = jacfunc.jacobian(lambda a: a @ a)(a)
    torch.testing.assert_close(actual, expected)
    assert actual[0, 0].tolist() == [[2.0, 3.0], [2.0, 0.0]]


def test_a_numpy_array_stays_in_double_precision():
    array = np.array([1.0, 2.0])
    jac = jacfunc.jacobian(torch.exp)(torch.from_numpy(array))
    assert jac.dtype == torch.float64
    np.testing.assert_allclose(jac.numpy(), np.diag(np.exp(array)), rtol=1e-15)
    with pytest.raises(TypeError, match=r"got ndarray. Convert it with torch.as_tensor"):
        jacfunc.jacobian(torch.exp)(array)


def flops(compute):
    with FlopCounterMode(display=False) as counter:
        result = compute()
    return counter.get_total_flops(), result


def test_a_classifiers_jacobian_by_images_takes_c_sweeps_not_b_times_c():
    torch.manual_seed(0)
    batch, classes = 6, 4
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, classes))
    images = torch.randn(batch, 3, 8, 8)

    def one_backward_a_class():
        leaf = images.clone().requires_grad_()
        logits = model(leaf.clone())  # the counter cannot hook a leaf
        rows = [
            torch.autograd.grad(logits[:, c].sum(), leaf, retain_graph=True)[0]
            for c in range(classes)
        ]
        return torch.stack(rows, 1)

    by_images = jacfunc.module_jacobian(
        model, "inputs", per_sample=True, strategy="reverse", independent=True
    )  # which is looked at now and then
    flops(lambda: by_images(images))  # the counter sets hooks, with which layouts are learned
    ours, jac = flops(lambda: by_images(images))
    theirs, expected = flops(one_backward_a_class)
    assert jac.shape == (batch, classes, 3, 8, 8)
    torch.testing.assert_close(jac, expected)
    assert ours <= theirs


def test_jacobians_by_parameters_and_not_only_by_inputs():
    model = nn.Linear(3, 2)
    x = torch.randn(3)
    jac = jacfunc.module_jacobian(model)(x)
    torch.testing.assert_close(jac["weight"], torch.einsum("ik,l->ikl", torch.eye(2), x))
    torch.testing.assert_close(jac["bias"], torch.eye(2))


def test_one_row_or_one_element_without_the_rest():
    pulls = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            pulls.append(grad)
            return grad

    a = torch.randn(1000, 3)
    _, pullback = jacfunc.vjp(lambda x: Counted.apply(a @ x), torch.randn(3))
    (row,) = pullback(torch.eye(1000)[17])
    torch.testing.assert_close(row, a[17])
    torch.testing.assert_close(row[2], a[17, 2])
    assert len(pulls) == 1


def test_products_without_the_jacobian():
    a, x, v, w = torch.randn(4, 3), torch.randn(3), torch.randn(3), torch.randn(4)

    def func(x):
        return torch.tanh(a @ x)

    jac = torch.diag(1 - torch.tanh(a @ x) ** 2) @ a
    value, pushed = jacfunc.jvp(func, (x,), (v,))
    torch.testing.assert_close(value, func(x))
    torch.testing.assert_close(pushed, jac @ v)
    torch.testing.assert_close(jacfunc.vjp(func, x)[1](w)[0], w @ jac)


@pytest.mark.parametrize("strategy", ["auto", "reverse", "forward", "looped"])
def test_a_jacobian_norm_inside_a_loss(strategy):
    x = torch.tensor([0.3, -0.2], dtype=torch.float64)
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    # of a linear map the Jacobian is the weight: the penalty's gradient is twice the weight
    penalty = jacfunc.jacobian(lambda x: weight @ x, strategy=strategy)(x).square().sum()
    penalty.backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())
