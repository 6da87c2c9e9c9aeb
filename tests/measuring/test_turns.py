"""Ways that calls take in turn, until the fastest is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from jacfunc._measuring import InTurn, Run
from jacfunc._measuring.turns import ROUNDS

X = torch.zeros(())


def taken(ways: InTurn[str], calls: int) -> list[str | None]:
    return [ways.way if ways.is_over else ways.timed(lambda: ways.way, X) for _ in range(calls)]


def clock(seconds: Sequence[float]) -> Callable[[Run, torch.device], float]:
    """Lets calls take so many seconds, one after the other."""
    following = iter(seconds)

    def seconds_of(run: Run, device: torch.device) -> float:
        run()
        return next(following)

    return seconds_of


@pytest.mark.parametrize(("second", "kept"), [(1.0, "b"), (3.0, "a"), (2.0, "a")])
def test_every_way_has_its_turns_and_the_fastest_is_kept(second: float, kept: str) -> None:
    slow = [9.0, 9.0] * (ROUNDS - 1)  # as a busy machine makes most calls
    ways = InTurn(["a", "b"], clock([*slow, 2.0, second]))
    assert taken(ways, 2 * ROUNDS + 3) == ["a", "b"] * ROUNDS + [kept] * 3
    assert ways.is_over


def test_a_call_without_a_result_is_no_turn() -> None:
    ways = InTurn(["a", "b"], clock([0.0, 2.0, 1.0] * ROUNDS))
    for _ in range(ROUNDS):
        assert ways.timed(lambda: None, X) is None
        assert taken(ways, 2) == ["a", "b"]
    assert (ways.way, ways.is_over) == ("b", True)


def test_calls_of_other_threads_may_end_it_meanwhile() -> None:
    ways = InTurn(["a", "b"], clock([1.0, 2.0] * ROUNDS + [0.5]))
    assert taken(ways, 2) == ["a", "b"]

    def run() -> str:
        taken(ways, 2 * ROUNDS - 2)
        return "a"

    ways.timed(run, X)
    assert (ways.way, ways.is_over) == ("a", True)


def test_one_way_is_not_timed() -> None:
    assert InTurn(["a"]).is_over
