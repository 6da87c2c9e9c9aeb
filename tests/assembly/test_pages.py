"""Memory that results have left is written into again, and never while anybody holds it."""

from __future__ import annotations

import copy
import gc
import mmap
import pickle
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import jacfunc
from jacfunc._assembly.pages import PAGES, FreedPages, empty
from jacfunc._memory.counting import PeakBytes
from jacfunc._memory.limits import LARGE, PAGED_BYTES

pytestmark = pytest.mark.skipif(
    not hasattr(mmap, "MADV_FREE"), reason="this system knows no pages that it may take back"
)

LIKE = torch.ones(3)
SIZE = 2**16
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""Where the system says whether it has pages of 2 MiB for who asks."""


@pytest.fixture
def pages() -> Iterator[FreedPages]:
    """Pages of this test alone, for tensors from 1 KiB on."""
    yield FreedPages(least=2**10)
    gc.collect()


@pytest.fixture
def shared() -> FreedPages:
    """The pages of the process, of which none wait."""
    gc.collect()
    jacfunc.empty_cache()
    return PAGES


def made(pages: FreedPages, value: float, size: int = SIZE) -> Tensor:
    return empty(LIKE, (size // 4,), pages=pages).fill_(value)


VIEWS: dict[str, Callable[[Tensor], object]] = {
    "itself": lambda x: x,
    "slice": lambda x: x[5:6],
    "view of a view": lambda x: x.view(2, -1).t()[3],
    "detached": lambda x: x.detach(),
    "numpy": lambda x: x.numpy(),
    "dlpack": lambda x: torch.from_dlpack(x.detach()),
    "storage": lambda x: x.untyped_storage(),
    "in a graph": lambda x: x.requires_grad_().exp(),
    "of another dtype": lambda x: x.view(torch.int32),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_nothing_is_written_over_while_anybody_holds_it(
    pages: FreedPages, view: Callable[[Tensor], object]
) -> None:
    first = made(pages, 1.0)
    held, address = view(first), first.data_ptr()
    del first
    second = made(pages, 2.0)
    assert second.data_ptr() != address
    del held
    third = made(pages, 3.0)
    assert third.data_ptr() == address
    assert second.eq(2.0).all()
    assert third.eq(3.0).all()


def test_a_loop_that_holds_the_last_result_goes_back_and_forth(pages: FreedPages) -> None:
    addresses, result = [], None
    for step in range(6):
        result = made(pages, float(step))
        addresses.append(result.data_ptr())
    assert len(set(addresses)) == 2
    assert addresses[2:] == addresses[:2] * 2
    assert pages.most_bytes == 2 * SIZE


def test_never_more_are_mapped_than_were_taken_at_the_same_time(pages: FreedPages) -> None:
    generator = torch.Generator().manual_seed(0)
    held: list[Tensor] = []
    most = 0
    for _ in range(200):
        size = 2 ** int(torch.randint(10, 18, (), generator=generator))
        held.append(made(pages, 1.0, size))
        most = max(most, sum(x.nbytes for x in held))
        if len(held) > 4:
            del held[int(torch.randint(4, (), generator=generator))]
        taken = sum(x.nbytes for x in held)
        assert taken <= pages.bytes_in_use <= 2 * most  # pages are at most twice as large as needed
        assert pages.bytes_in_use + pages.bytes_waiting <= pages.most_bytes


def test_emptied_it_keeps_nothing(shared: FreedPages) -> None:
    before = shared.bytes_in_use
    held = made(shared, 1.0, LARGE)
    made(shared, 2.0, LARGE)
    assert shared.bytes_waiting == LARGE
    jacfunc.empty_cache()
    assert (shared.bytes_waiting, shared.bytes_in_use - before) == (0, LARGE)
    assert held.eq(1.0).all()
    del held
    assert shared.bytes_waiting == LARGE


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_it_is_as_any_new_tensor(pages: FreedPages, dtype: torch.dtype) -> None:
    found = empty(LIKE, (30, 1, 50), dtype, pages=pages)
    assert pages.bytes_in_use == found.nbytes
    expected = LIKE.new_empty((30, 1, 50), dtype=dtype)
    for of in (Tensor.size, Tensor.stride, Tensor.is_leaf.__get__, Tensor._is_view):
        assert of(found) == of(expected)
    assert found.dtype == dtype
    assert not found.requires_grad
    assert found.fill_(2).eq(2).all()


def test_it_is_copied_sent_and_shared_as_any_other(pages: FreedPages) -> None:
    found = made(pages, 5.0)
    for copied in (copy.deepcopy(found), pickle.loads(pickle.dumps(found)), found.clone()):
        assert copied.data_ptr() != found.data_ptr()
        assert copied.eq(5.0).all()
    found.share_memory_()  # it moves, and its pages are free
    assert (pages.bytes_in_use, pages.bytes_waiting) == (0, SIZE)
    assert made(pages, 6.0).eq(6.0).all()
    assert found.is_shared()
    assert found.eq(5.0).all()


def test_small_ones_and_those_of_transforms_are_torchs_own(pages: FreedPages) -> None:
    empty(LIKE, (2**10 // 4 - 1,), pages=pages)
    torch.func.vmap(lambda x: empty(x, (SIZE,), pages=pages).zero_() + x)(torch.ones(4))
    traced = make_fx(lambda x: empty(x, (SIZE,), pages=pages).copy_(x.expand(SIZE)))(torch.ones(1))
    assert pages.bytes_in_use == 0
    # a tensor that no operation made would be a constant of the trace
    torch.testing.assert_close(traced(torch.full((1,), 3.0)), torch.full((SIZE,), 3.0))


def test_it_is_counted_like_any_other_memory(pages: FreedPages) -> None:
    for _ in range(2):  # new pages, and old ones
        with PeakBytes() as counter:
            held = made(pages, 1.0)
            assert (counter.live, counter.peak) == (SIZE, SIZE)
            del held
            assert counter.live == 0


@pytest.mark.skipif(
    not HUGE.exists() or "[never]" in HUGE.read_text(), reason="this system has small pages alone"
)
def test_large_ones_lie_in_large_pages(pages: FreedPages) -> None:
    """A fault for each small one took most of the time of a result in new pages."""
    result = made(pages, 1.0, 2**26)
    assert _bytes_in_huge_pages(result.data_ptr()) >= 2**25  # a system short of memory has fewer


@pytest.mark.skipif(
    not HUGE.exists() or "[never]" in HUGE.read_text(), reason="this system has small pages alone"
)
def test_sizes_between_large_pages_have_as_many_as_fit(pages: FreedPages) -> None:
    """The system aligns what has a multiple of their size alone; others lost one of two."""
    before = _bytes_in_all_huge_pages()
    results = [made(pages, 1.0, 2**22 + 2**12 * n) for n in range(1, 9)]
    assert _bytes_in_all_huge_pages() - before >= 7 * 2**22
    assert pages.bytes_in_use == sum(x.nbytes for x in results)


def _bytes_in_all_huge_pages() -> int:
    told = Path("/proc/self/smaps_rollup").read_text().split()
    return int(told[told.index("AnonHugePages:") + 1]) * 2**10


def _bytes_in_huge_pages(address: int) -> int:
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, value, *_ = line.split()
        if not key.endswith(":"):
            start, stop = (int(end, 16) for end in key.split("-"))
            is_inside = start <= address < stop
        elif is_inside and key == "AnonHugePages:":
            return int(value) * 2**10
    raise AssertionError("no mapping holds this address")


def test_without_memory_torch_says_so(pages: FreedPages) -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        empty(LIKE, (2**60,), pages=pages)
    assert pages.bytes_in_use == pages.bytes_waiting == pages.most_bytes == 0


def test_many_threads_get_memory_of_their_own(pages: FreedPages) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            mine = made(pages, float(number))
            if not bool(mine.eq(number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (
        pages.most_bytes <= 16 * SIZE
    )  # what one thread is giving back, another still counts as taken


BATCH, WIDTH = 64, 2**13
"""Samples and inputs of a linear layer whose Jacobians are just large: 32 MiB."""


@pytest.mark.parametrize("strategy", ["auto", "reverse", "structured"])
@pytest.mark.parametrize("flat", [False, True])
def test_results_of_a_loop_are_right(shared: FreedPages, strategy: str, flat: bool) -> None:
    """Of a linear layer: each output's gradient is the input."""
    model = nn.Linear(WIDTH, 4, bias=False)
    jac = jacfunc.module_jacobian(model, per_sample=True, strategy=strategy, flat=flat)
    held: list[tuple[Tensor, Tensor]] = []
    for step in range(6):
        x = torch.full((BATCH, WIDTH), float(step))
        result = jac(x) if flat else jac(x)["weight"]
        held.append((x, result.view(BATCH, 4, 4, WIDTH)))
        for inputs, block in held[-2:]:
            expected = torch.eye(4)[:, :, None] * inputs[:, None, None, :]
            assert torch.equal(block, expected)
        held = held[-2:]


@pytest.mark.parametrize("flat", [False, True])
def test_memory_comes_from_earlier_results(shared: FreedPages, flat: bool) -> None:
    """Also in later calls, in which the parameters themselves are differentiated by."""
    before = shared.bytes_in_use
    model = nn.Linear(WIDTH, 4)
    jac = jacfunc.module_jacobian(model, per_sample=True, flat=flat, strategy="structured")
    addresses = set[int]()
    for _ in range(24):
        result = jac(torch.randn(BATCH, WIDTH))
        addresses.add((result if flat else result["weight"]).data_ptr())
        del result
    assert len(addresses) == 1
    bias = BATCH * 4 * 4 * 4 if flat else 0
    assert (shared.bytes_in_use - before, shared.bytes_waiting) == (0, LARGE + bias)


def many_parts() -> nn.Module:
    """Its per-sample Jacobian has parts of 20 MiB, less than what the heap gives back at once."""
    torch.manual_seed(0)
    layers = nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10)
    return nn.Sequential(*layers)


DOORS: dict[str, Callable[[nn.Module], Callable[[Tensor], dict[str, Tensor]]]] = {
    "per sample": lambda model: jacfunc.module_jacobian(
        model, per_sample=True, strategy="structured"
    ),
    "rows in chunks": lambda model: jacfunc.module_jacobian(model, strategy=jacfunc.Reverse(5)),
}


@pytest.mark.parametrize("door", DOORS)
def test_parts_of_results_lie_in_pages_of_earlier_ones(shared: FreedPages, door: str) -> None:
    """Of the heap nothing certain can be said: what it keeps depends on what lies beside."""
    derive, x, before = DOORS[door](many_parts()), torch.randn(2, 512), shared.bytes_in_use
    addresses, taken = set[int](), 0
    for _ in range(6):
        parts = [part for part in derive(x).values() if part.nbytes >= PAGED_BYTES]
        taken = sum(part.nbytes for part in parts)
        assert len(parts) == 2
        assert shared.bytes_in_use - before == taken
        addresses |= {part.data_ptr() for part in parts}
        del parts
    assert len(addresses) == 2
    assert (shared.bytes_in_use - before, shared.bytes_waiting) == (0, taken)


def test_parts_of_results_take_no_new_pages(shared: FreedPages) -> None:
    derive, x = DOORS["per sample"](many_parts()), torch.randn(2, 512)
    nbytes = sum(part.nbytes for part in derive(x).values())
    faults = []
    for _ in range(9):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        derive(x)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sorted(faults)[4] < nbytes / mmap.PAGESIZE / 20  # the system may take some back


@pytest.mark.parametrize("door", DOORS)
def test_a_part_that_is_kept_is_never_written_into_again(shared: FreedPages, door: str) -> None:
    derive, kept = DOORS[door](many_parts()), []
    for step in range(4):
        for part in derive(torch.full((2, 512), 1.0 + step)).values():
            if part.nbytes >= PAGED_BYTES:
                corner = part.flatten(2)[:, :, -3:].numpy()  # keeps the pages by a view alone
                kept.append((corner, corner.copy()))
    assert len({corner.__array_interface__["data"][0] for corner, _ in kept}) == len(kept) == 8
    assert all((corner == then).all() for corner, then in kept)
