"""Small unit seeds are kept for later sweeps, which must not see what was written into them."""

from __future__ import annotations

import torch

from jacfunc._assembly import shared_units


def test_seeds_of_one_kind_are_made_once() -> None:
    leaves = (torch.ones(4, 3),)
    seeds = shared_units(leaves)
    assert shared_units((torch.zeros(4, 3),))[0] is seeds[0]
    assert torch.equal(seeds[0][:, 0], torch.eye(3))
    assert shared_units((torch.ones(4, 3).double(),))[0].dtype == torch.float64


def test_seeds_that_were_written_into_are_made_anew() -> None:
    leaves = (torch.ones(1, 7),)
    shared_units(leaves)[0].mul_(2)
    assert torch.equal(shared_units(leaves)[0][:, 0], torch.eye(7))


def test_seeds_made_in_inference_mode_are_not_kept() -> None:
    leaves = (torch.ones(2, 11),)
    with torch.inference_mode():
        shared_units(leaves)
    assert not shared_units(leaves)[0].is_inference()
