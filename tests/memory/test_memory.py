"""Memory is the result and one chunk: counted below autograd, byte for byte."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import jacfunc
from jacfunc._arguments import check_memory
from jacfunc._assembly.basis import basis
from jacfunc._linear_map.operator import JacobianOperator
from jacfunc._log import trail
from jacfunc._memory.chunks import FittedChunks, in_chunks
from jacfunc._memory.counting import PeakBytes
from jacfunc._planning.budget import HEAP_FACTOR

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


# --- budgets ---

WIDE = torch.randn(3000, 40) / 6
TALL = torch.randn(1500, 3000) / 50
SQUARE = torch.randn(2400, 300) / 17


CLASSIFIER = nn.Sequential(nn.Linear(64, 1024), nn.Tanh(), nn.Linear(1024, 10))


def per_sample(model, **options):
    """Of the inputs, whose Jacobian is small beside the activations.

    Called before: the first time, the module gets copies of the parameters.
    """
    return jacfunc.module_jacobian(model, "inputs", per_sample=True, **options)


def within_a_tenth(name, device):
    """``derive(memory)``, and a point: the Jacobian is small beside what leads to it."""
    func, derive, size = {
        "jacrev": (lambda x: TALL.to(x) @ torch.tanh(WIDE.to(x) @ x), jacfunc.jacrev, (40,)),
        "jacfwd": (lambda x: WIDE.T.to(x) @ torch.tanh(TALL.T.to(x) @ x), jacfunc.jacfwd, (1500,)),
        "hessian": (lambda x: torch.tanh(SQUARE.to(x) @ x).square().sum(), jacfunc.hessian, (300,)),
        "auto": (lambda x: TALL.to(x) @ torch.tanh(WIDE.to(x) @ x), jacfunc.jacobian, (40,)),
        "per sample": (CLASSIFIER.to(device), per_sample, (64, 64)),
    }[name]
    x = torch.randn(size, device=device)
    return lambda memory: lambda: derive(func, memory=memory)(x)


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "hessian", "auto", "per sample"])
def test_a_tenth_of_the_unchunked_peak_is_enough(name, device):
    derive = within_a_tenth(name, device)
    if name == "auto":  # unchunked, auto may choose the cheaper direction
        unchunked, expected = peak_of(within_a_tenth("jacrev", device)(None))
        torch.testing.assert_close(derive("8 MB")(), derive(None)(), rtol=1e-4, atol=1e-5)
        assert peak_of(derive("8 MB"))[0] <= 8_000_000 < unchunked
        return
    derive(None)()
    unchunked, expected = peak_of(derive(None))
    budget = unchunked // 10
    peak, jac = peak_of(derive(budget))
    assert peak <= budget
    torch.testing.assert_close(jac, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per", [True, False], ids=["per sample", "whole"])
def test_a_budget_holds_for_layers_that_are_asked_for(per, device):
    """Convolutions of layers are unfolded, which takes several times the result."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 196, 10))
    model, x = model.to(device), torch.randn(12, 3, 16, 16, device=device)
    compute = jacfunc.module_jacobian(model, per_sample=per, strategy="structured")
    compute(x)
    _, expected = peak_of(lambda: compute(x))
    budget = 2 * sum(block.nbytes for block in expected.values())
    bounded = jacfunc.module_jacobian(model, per_sample=per, strategy="structured", memory=budget)
    peak, jac = peak_of(lambda: bounded(x))
    assert peak <= budget
    torch.testing.assert_close(jac, expected, rtol=1e-4, atol=1e-5)


class LastState(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(16, 48, batch_first=True), nn.Linear(48, 10)

    def forward(self, x):
        return self.head(self.gru(x)[0][:, -1])


def test_the_first_call_keeps_to_its_budget_too(device):
    """It learns where tensors hold the samples, of batches of any size."""
    model, x = LastState().to(device), torch.randn(52, 20, 16, device=device)
    y, budget = torch.arange(52, device=device) % 10, 10 * 2**20
    with PeakBytes() as counter:
        jacfunc.gradient_norms(model, F.cross_entropy, memory=budget)(x, y)
    assert counter.peak <= budget


def test_where_tensors_hold_samples_is_learned_in_little_memory(device):
    model, x = convolving().to(device), torch.randn(32, 1, 28, 28, device=device)
    norms, y = jacfunc.gradient_norms(model, F.cross_entropy), torch.arange(32, device=device) % 10
    with PeakBytes() as first:
        norms(x, y)
    with PeakBytes() as second:
        norms(x, y)
    assert first.peak <= 2 * second.peak


def test_what_is_drawn_for_a_piece_leaves_room_for_samples(device):
    model = nn.Sequential(nn.Linear(256, 32), nn.Tanh(), nn.Linear(32, 10)).to(device)
    sizes, x = [], torch.randn(512, 256, device=device)
    model.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    budget = 2 * 4 * 512 * len(x) * 10
    with PeakBytes() as counter:
        jacfunc.random_projection(model, 512, memory=budget)(x)
    assert counter.peak <= budget
    assert len(sizes) < 64


def test_on_a_cpu_a_chunk_counts_a_part_of_its_room():
    """The heap takes several times what a chunk counts: see ``HEAP_FACTOR``."""
    rows, columns = 2000, 1000
    func = tanh_of(torch.randn(rows, columns))
    result, x = 4 * rows * columns, torch.randn(columns)
    compute = jacfunc.jacrev(func, memory=2 * result)
    peak, jac = peak_of(lambda: compute(x))
    assert peak <= result + result // HEAP_FACTOR
    torch.testing.assert_close(jac, jacfunc.jacrev(func)(x), rtol=1e-4, atol=1e-5)


def test_a_single_sample_that_is_too_large_goes_by_rows(device):
    x = torch.randn(2, 64, device=device)
    model = CLASSIFIER.to(device)
    per_sample(model)(x)
    unchunked, expected = peak_of(lambda: per_sample(model)(x))
    budget = unchunked // 4
    peak, jac = peak_of(lambda: per_sample(model, memory=budget)(x))
    assert peak <= budget
    torch.testing.assert_close(jac, expected, rtol=1e-4, atol=1e-5)


def convolving():
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16 * 676, 10))


def test_rows_of_many_samples_are_so_few_at_once_that_the_heap_keeps_them():
    """On a CPU, that is: 10 rows of 64 samples are 2.6 MB each where they are most."""
    model, x = convolving(), torch.randn(64, 1, 28, 28)
    at_once, expected = peak_of(lambda: per_sample(model, strategy="reverse")(x))
    peak, jac = peak_of(lambda: per_sample(model)(x))
    assert peak < 0.6 * at_once
    torch.testing.assert_close(jac, expected, rtol=1e-4, atol=1e-5)
    with trail() as steps:
        per_sample(model)(x[:8])
    assert "Reverse(chunk_size=None)" in steps[-1]


class Listing(jacfunc.Autotune):
    """Lists what it would measure."""

    def plan_samples(self, operator, samples, run):
        self.measured = []
        return super().plan_samples(operator, samples, lambda way, _: self.measured.append(way))


def test_autotune_measures_fewer_rows_too():
    listing = Listing()
    per_sample(convolving(), strategy=listing)(torch.randn(64, 1, 28, 28))
    assert jacfunc.Reverse(3) in listing.measured
    per_sample(convolving(), strategy=listing)(torch.randn(8, 1, 28, 28))
    assert jacfunc.Reverse() in listing.measured
    once = listing.measured[: len(set(listing.measured))]  # a round of each comes first
    assert len(once) == len(set(once))
    assert jacfunc.Reverse(3) not in listing.measured


def test_rows_of_a_large_result_stay_one_write():
    """All parameters of 64 samples take more than the rows do on their way."""
    listing = Listing()
    by_both = ("params", "inputs")
    compute = jacfunc.module_jacobian(convolving(), by_both, per_sample=True, strategy=listing)
    compute(torch.randn(64, 1, 28, 28))
    assert jacfunc.Reverse() in listing.measured
    assert jacfunc.Reverse(3) not in listing.measured


@pytest.mark.parametrize("derive", [jacfunc.jacrev, jacfunc.jacfwd, jacfunc.jacobian])
def test_a_budget_must_hold_the_result(derive, device):
    func = tanh_of(torch.randn(ROWS, COLUMNS, device=device))
    with pytest.raises(ValueError, match=r": memory must hold the Jacobian .* got 9.77 KiB"):
        derive(func, memory="10 kB")(torch.randn(COLUMNS, device=device))


def test_memory_in_words():
    for words, size in (("1 kB", 1000), ("2KiB", 2048), ("1.5 GB", 1_500_000_000), ("7", 7)):
        assert check_memory("api", words) == size
    assert check_memory("api", 5) == 5
    assert check_memory("api", None) is None


@pytest.mark.parametrize("words", ["much", "-1 GB", "1 XB", "", 0, -3])
def test_memory_that_is_none(words):
    with pytest.raises(ValueError, match="jacrev: memory must be a positive number of bytes, got"):
        jacfunc.jacrev(torch.sin, memory=words)
    with pytest.raises(TypeError, match="jacfwd: memory must be a number of bytes, a string"):
        jacfunc.jacfwd(torch.sin, memory=2.0)
    with pytest.raises(ValueError, match="strategy 'looped' must have no memory"):
        jacfunc.jacobian(torch.sin, strategy="looped", memory=10)
    with pytest.raises(ValueError, match="memory must come with a strategy's name"):
        jacfunc.jacobian(torch.sin, strategy=jacfunc.Reverse(), memory=10)


def sizes_taken(total, chunk, bytes_of=lambda size: 0):
    sizes = []

    def take(start, stop):
        sizes.append(stop - start)
        return (torch.empty(bytes_of(stop - start), dtype=torch.uint8),)

    list(in_chunks(total, chunk, take))
    return sizes


def test_chunks_grow_to_what_fits_and_stay():
    within = FittedChunks(4000)
    assert sizes_taken(200, within, lambda size: 40 * size) == [2, 96, 96, 6]
    assert within.settled == [96]
    assert sizes_taken(100, within, lambda size: 40 * size) == [96, 4]


def test_a_constant_that_hides_the_growth_is_not_trusted():
    assert sizes_taken(100, FittedChunks(1000), lambda size: 300 + 20 * size) == [
        2,
        5,
        12,
        16,
        16,
        16,
        16,
        16,
        1,
    ]
    taken = sizes_taken(3000, FittedChunks(1000), lambda size: max(300, 20 * size))
    assert max(taken) <= 50


def test_what_is_made_once_makes_no_later_chunk_smaller():
    """The result, for one, is made with the first chunk: more than all chunks may take."""
    result = []

    def bytes_of(size):
        if not result:
            result.append(torch.empty(10**6, dtype=torch.uint8))
        return 40 * size

    within = FittedChunks(4000)
    assert sizes_taken(200, within, bytes_of) == [2, 2, 96, 96, 4]
    assert within.settled == [96]
    result.clear()
    assert sizes_taken(10, FittedChunks(60), bytes_of) == [2, 2, 1, 1, 1, 1, 1, 1]


def test_chunks_have_a_limit():
    assert sizes_taken(20, FittedChunks(10**9, at_most=8), lambda size: size) == [2, 8, 8, 2]
    assert sizes_taken(20, FittedChunks(10**9), lambda size: size) == [2, 18]
    assert sizes_taken(3, FittedChunks(1), lambda size: 10 * size) == [2, 1]
    assert sizes_taken(0, FittedChunks(1)) == [0]


def test_chunks_that_are_copied_grow_to_a_share_of_all_products():
    assert sizes_taken(80, FittedChunks.by_share(1), lambda size: 100 * size) == [1] + [10] * 7 + [
        9
    ]
    assert sizes_taken(80, FittedChunks.by_share(2000), lambda size: 100 * size) == [
        1,
        16,
        16,
        16,
        16,
        15,
    ]
