"""Memory is the result and one chunk: counted below autograd, byte for byte."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import jacfunc
from jacfunc._basis import basis
from jacfunc._counting import PeakBytes
from jacfunc._operators import JacobianOperator

ROWS, COLUMNS = 512, 256
SLACK = 4 * 4 * (ROWS + COLUMNS)  # a few vectors: the point, its image, one seed more


def tanh_of(matrix):
    return lambda x: torch.tanh(matrix @ x)


def peak_of(compute):
    compute()  # what torch allocates once is not the Jacobian's
    gc.collect()
    with PeakBytes() as counter:
        result = compute()
    return counter.peak, result


def work_of_one_chunk(func, x, strategy, chunk_size):
    """Peak bytes of evaluating and sweeping a single chunk of seeds, without a result to fill."""

    def sweep():
        operator = JacobianOperator(lambda x: ((func(x),), ()), (x,))
        if strategy == "reverse":
            return operator.pullback_batch(next(basis(operator.outputs, chunk_size)))
        return operator.pushforward_batch(next(basis(operator.primals, chunk_size)))

    return peak_of(sweep)[0]


@pytest.mark.parametrize("strategy", ["reverse", "forward"])
@pytest.mark.parametrize("chunk_size", [1, 8, 64, 100])
def test_a_chunked_jacobian_takes_the_result_and_one_chunk(strategy, chunk_size, device):
    func = tanh_of(torch.randn(ROWS, COLUMNS, device=device))
    x = torch.randn(COLUMNS, device=device)
    compute = jacfunc.jacobian(func, strategy=strategy, chunk_size=chunk_size)
    peak, jac = peak_of(lambda: compute(x))
    result = jac.numel() * jac.element_size()
    assert result < peak <= result + work_of_one_chunk(func, x, strategy, chunk_size) + SLACK


@pytest.mark.parametrize("over", ["rows", "columns"])
def test_a_looped_jacobian_takes_the_result_and_one_seed(over, device):
    func = tanh_of(torch.randn(ROWS, COLUMNS, device=device))
    x = torch.randn(COLUMNS, device=device)
    compute = jacfunc.jacobian(func, strategy=jacfunc.Looped(over=over))
    peak, jac = peak_of(lambda: compute(x))
    result = jac.numel() * jac.element_size()
    direction = {"rows": "reverse", "columns": "forward"}[over]
    assert result < peak <= result + work_of_one_chunk(func, x, direction, 1) + SLACK


def test_an_unchunked_jacobian_is_not_copied(device):
    matrix = torch.randn(ROWS, COLUMNS, device=device)
    x = torch.randn(COLUMNS, device=device)
    peak, jac = peak_of(lambda: jacfunc.jacrev(lambda x: matrix @ x)(x))
    result = jac.numel() * jac.element_size()
    assert peak <= result + 4 * ROWS * ROWS + SLACK


@pytest.mark.parametrize("chunk_size", [1, 16])
def test_per_sample_chunks_bound_the_memory_too(chunk_size, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)).to(device)
    x = torch.randn(8, 32, device=device)

    compute = jacfunc.module_jacobian(
        model, per_sample=True, strategy="reverse", chunk_size=chunk_size
    )
    peak, jac = peak_of(lambda: compute(x))
    result = sum(block.numel() * block.element_size() for block in jac.values())
    activations = 2**18
    assert result < peak < result * (1 + chunk_size / 32) + activations


def test_no_graph_is_kept_where_nothing_requires_grad(device):
    big = torch.randn(64, 64, device=device)
    seen = []

    def func(x):
        hidden = torch.sin(big * x)
        seen.append(weakref.ref(hidden.untyped_storage()))
        return hidden.sum(1)

    jac = jacfunc.jacrev(func)(torch.randn(64, device=device))
    gc.collect()
    assert not jac.requires_grad
    assert seen[0]() is None


@pytest.mark.parametrize("strategy", ["reverse", "forward", "looped"])
def test_module_jacobians_keep_no_graph_although_parameters_require_grad(strategy, device):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(device)
    jac = jacfunc.module_jacobian(model, strategy=strategy)(torch.ones(3, 4, device=device))
    assert all(block.grad_fn is None for block in jac.values())


class Allocator(TorchDispatchMode):
    """A device with little memory: an operation whose result is larger fails as on CUDA or CPU."""

    def __init__(self, limit, error):
        super().__init__()
        self.limit, self.error, self.failures = limit, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor) or "empty" in str(func):
            return result  # what is allocated for the whole result must fit
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        is_new = result.untyped_storage()._cdata not in given
        if is_new and result.numel() * result.element_size() > self.limit:
            self.failures += 1
            raise self.error
        return result


ON_CUDA = torch.OutOfMemoryError("CUDA out of memory.")
ON_CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


@pytest.mark.parametrize("error", [ON_CUDA, ON_CPU], ids=["cuda", "cpu"])
@pytest.mark.parametrize("strategy", ["reverse", "forward"])
@pytest.mark.parametrize("chunk_size", [None, 100])
def test_out_of_memory_halves_the_chunk_and_loses_nothing(strategy, error, chunk_size, caplog):
    def func(x):
        return torch.tanh(torch.cat([x, 2 * x.flip(0)]))

    x = torch.randn(COLUMNS)
    compute = jacfunc.jacobian(func, strategy=strategy, chunk_size=chunk_size)
    expected = compute(x)
    with caplog.at_level("INFO", "jacfunc"), Allocator(20 * ROWS * 4, error) as allocator:
        jac = compute(x)
    assert torch.equal(jac, expected)
    assert allocator.failures >= 2
    assert "out of memory with" in caplog.text


def test_out_of_memory_with_a_single_seed_is_raised():
    func = tanh_of(torch.randn(ROWS, COLUMNS))
    with Allocator(8, ON_CUDA), pytest.raises(torch.OutOfMemoryError):
        jacfunc.jacrev(func)(torch.randn(COLUMNS))
