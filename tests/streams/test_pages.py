"""Pages of memory that blocks of a stream are written into: those of earlier blocks, once free."""

from __future__ import annotations

import resource

import pytest
import torch
from torch import nn

import jacfunc
from jacfunc._assembly.pages import PAGES
from jacfunc._memory.limits import PAGED_BYTES

WAYS = ("params", "rows", "samples")
PAGE = 4096


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 10))


def parts_of(block):
    return list(block.values()) if isinstance(block, dict) else [block]


def faults_of(work):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.parametrize("by", WAYS)
def test_blocks_take_no_new_pages(by):
    """A loop has two blocks at a time, and keeps what it has made of others between them."""
    module, x = perceptron(), torch.randn(8, 784)
    stream = jacfunc.stream_jacobian(module, by, per_sample=True, independent=True)
    nbytes = 8 * 10 * 4 * sum(param.numel() for param in module.parameters())

    def drain():
        parts = (part for _, block in stream(x) for part in parts_of(block))
        return [part.flatten(2)[..., ::97].clone() for part in parts]

    for _ in range(2):
        drain()
    faults = sum(faults_of(drain) for _ in range(4))
    assert faults < 4 * nbytes / PAGE / 20  # the system may take some back at any time
    jacfunc.empty_cache()


@pytest.mark.parametrize("by", WAYS)
def test_blocks_lie_in_pages_that_wait_for_the_next(by):
    """Of the heap nothing certain can be said: what it keeps depends on what lies beside."""
    module, x = perceptron(), torch.randn(2, 784)
    stream = jacfunc.stream_jacobian(module, by, per_sample=True, independent=True)
    list(stream(x))
    jacfunc.empty_cache()
    before = PAGES.bytes_in_use
    blocks = list(stream(x))
    large = [x.nbytes for _, block in blocks for x in parts_of(block) if x.nbytes >= PAGED_BYTES]
    assert PAGES.bytes_in_use - before == sum(large) > 0
    del blocks
    assert PAGES.bytes_in_use == before
    jacfunc.empty_cache()


@pytest.mark.parametrize("by", WAYS)
def test_a_block_that_is_kept_is_never_written_into_again(by):
    module, x = perceptron(), torch.randn(2, 784)
    stream = jacfunc.stream_jacobian(module, by, per_sample=True, independent=True)
    for data in (x, -x):  # blocks of the first are dropped, but for a corner of each
        for _, block in stream(data):
            del block
    kept = []
    for data in (x, -x, 2 * x):
        for at, block in stream(data):
            for part in parts_of(block):
                corner = part.flatten(2)[:, :, :3].numpy()  # keeps the pages by a view alone
                kept.append((by, at, corner, corner.copy()))
            del block, part
    assert all((corner == then).all() for *_, corner, then in kept)
    assert len({corner.__array_interface__["data"][0] for *_, corner, _ in kept}) == len(kept)
    jacfunc.empty_cache()
