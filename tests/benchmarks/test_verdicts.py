"""Intervals hold what they say, ties and winners are told apart, and runs are compared rightly.

All on seeded synthetic times: rounds scatter by 13 % and processes by 2 %, log-normally, as small
functions did where this was measured on a machine without other load.
"""

import math
from itertools import count

import pytest
import torch

from benchmarks.report.tables import table_of
from benchmarks.running.records import Run
from benchmarks.verdicts.comparing import compare, judge
from benchmarks.verdicts.intervals import (
    Interval,
    against,
    beside,
    divided,
    exponent,
    median_interval,
    slope,
    verdict,
    winners,
)
from benchmarks.verdicts.sentences import sentence

ROUNDS, WITHIN, BETWEEN = 40, 0.13, 0.02
BASE = "torch.func"


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def result(name, seconds, family="", status="ok"):
    """As a file has it: numbers of rounds are strings."""
    family = family or ("torch.func" if name == BASE else "jacfunc")
    rounds = seconds if isinstance(seconds, dict) else dict(enumerate(seconds, 1))
    return {
        "contestant": name,
        "family": family,
        "status": status,
        "seconds": {str(number): took for number, took in rounds.items()},
        "time": {"median": 1.0} if rounds and status == "ok" else None,
    }


def record(*results, ours="jacfunc", axis="", baseline=BASE, **sizes):
    return {
        "question": "q",
        "asks": "How fast?",
        "case": "c",
        "ours": ours,
        "axis": axis,
        "baseline": baseline,
        "sizes": sizes,
        "results": list(results),
    }


def flat(ratio, rounds=9):
    """Times without noise, beside a baseline of 1."""
    return [ratio] * rounds


# --- intervals ---


@pytest.mark.parametrize("rounds", [2, 3, 4, 8, 20, 40])
def test_intervals_hold_the_true_ratio_in_95_of_100(rounds):
    noise = drawn(rounds, 200, rounds) * WITHIN
    found = [median_interval((0.7 * row.exp()).tolist()) for row in noise]
    share = sum(interval.contains(0.7) for interval in found) / 200
    assert 0.91 <= share <= 0.99
    assert all(interval.low <= interval.mid <= interval.high for interval in found)


def test_few_rounds_give_wide_intervals_and_one_round_none():
    widths = {
        rounds: math.log(found.high / found.low)
        for rounds in (2, 4, 10, 40)
        if (found := median_interval([1.0, 1.1] * (rounds // 2)))
    }
    assert widths[2] > widths[4] > widths[10] >= widths[40]
    assert widths[2] > 1.0
    assert median_interval([0.5]) == Interval(0.5, 0.5, 0.5)


def test_intervals_are_the_same_every_time_and_leave_torchs_numbers_alone():
    values = drawn(0, 40).exp().tolist()
    before = torch.get_rng_state()
    assert median_interval(values) == median_interval(values)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_ratio_is_taken_round_by_round_where_both_took_part():
    speed = drawn(1, 40).exp()  # of the machine, which all of a round share
    ours = {n: float(0.5 * speed[n]) for n in range(2, 40, 3)}
    theirs = {n: float(speed[n]) for n in range(40)}
    found = beside(record(result("jacfunc", ours), result(BASE, theirs)), "jacfunc", BASE)
    assert (found.low, found.mid, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_without_a_common_round_the_medians_are_compared():
    ours, theirs = (
        {n: float(x) for n, x in zip(rounds, (drawn(start, 20) * WITHIN).exp(), strict=True)}
        for start, rounds in ((2, range(1, 40, 2)), (3, range(2, 41, 2)))
    )
    case = record(result("jacfunc", ours), result(BASE, theirs))
    found = beside(case, "jacfunc", BASE)
    back = beside(case, BASE, "jacfunc")
    assert found.contains(1.0)
    assert found.low < found.mid < found.high
    assert (1 / back.high, 1 / back.low) == pytest.approx((found.low, found.high))


def test_who_has_the_warm_up_alone_is_compared_in_it():
    case = record(result("slow", {0: 30.0}), result(BASE, {0: 2.0, 1: 1.0, 2: 1.0}))
    assert beside(case, "slow", BASE) == Interval(15.0, 15.0, 15.0)


def test_who_failed_has_no_ratio():
    case = record(result("jacfunc", [1.0], status="out of memory"), result(BASE, [1.0]))
    assert beside(case, "jacfunc", BASE) is None
    assert beside(case, "nobody", BASE) is None


def test_quotients_of_independent_intervals_hold_the_truth_in_95_of_100():
    noise = (drawn(5, 200, 2, ROUNDS) * WITHIN).exp()
    found = [divided(median_interval(a), median_interval(b)) for a, b in noise.tolist()]
    assert 0.91 <= sum(interval.contains(1.0) for interval in found) / 200 <= 0.99


# --- verdicts ---


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0.5, 0.6, 0.7), "faster"),
        ((1.2, 1.3, 1.4), "slower"),
        ((0.94, 0.96, 0.98), "tie"),  # surely not 1, but near it
        ((0.7, 0.9, 1.1), "tie"),  # not near 1, but perhaps it
        ((1.3, 1.3, 1.3), "slower"),
    ],
)
def test_a_tie_is_near_1_or_cannot_be_told_from_it(interval, expected):
    assert verdict(Interval(*interval)) == expected


def test_the_fastest_wins_and_whoever_ties_with_it():
    case = record(
        result("slow", flat(0.8)),
        result("near", flat(0.51)),
        result("first", flat(0.5)),
        result(BASE, flat(1.0)),
        result("copy", flat(0.1), family="bound"),
        result("wrong", flat(0.2), status="wrong: by 3"),
    )
    assert winners(case) == ["first", "near"]


def test_where_the_baseline_failed_there_is_a_winner_all_the_same():
    case = record(
        result("a", flat(2.0)), result("b", flat(1.0)), result(BASE, {}, status="crashed: 11")
    )
    assert winners(case) == ["b"]
    assert winners(record(result(BASE, {}, status="out of memory"))) == []


# --- sentences ---


def test_a_sentence_says_how_often_we_win_by_how_much_and_who_else_does():
    cases = [
        record(result("jacfunc", flat(ours)), result("Opacus", flat(0.5)), result(BASE, flat(1)))
        for ours in (0.25, 0.4, 0.51, 0.8)
    ]
    assert sentence(cases) == (
        "jacfunc is the fastest or ties with it in 3 of 4 cases, "
        "at 0.46 of the time of torch.func (0.25 to 0.80); elsewhere Opacus wins."
    )


def test_a_sentence_counts_cases_in_which_we_fail():
    cases = [
        record(result("jacfunc", flat(0.5), status="unsupported: x"), result(BASE, flat(1))),
        record(result("jacfunc", flat(0.5)), result(BASE, flat(1))),
    ]
    assert "in 1 of 2 cases, at 0.50 of the time of torch.func; elsewhere" in sentence(cases)


def test_a_sentence_on_growth_says_the_fitted_exponents():
    cases = [
        record(
            result("jacfunc", flat(1e-3 * size**2)),
            result(BASE, flat(size**3)),
            axis="batch",
            batch=size,
        )
        for size in (8, 16, 32)
    ]
    assert "its time grows as batch^2.00" in sentence(cases)
    assert exponent(cases, BASE, "batch") == pytest.approx(3)
    assert exponent(cases[:2], BASE, "batch") is None
    assert slope([1, 2, 4], [5, 10, 20]) == pytest.approx(1)


def test_where_we_are_the_baseline_the_fastest_other_is_what_we_are_held_against():
    cases = [
        record(
            result("jacfunc", flat(1.0)),
            result("jacfunc, afresh", flat(0.99)),
            result("fill_", flat(0.1), family="bound"),
            result("TorchJD", flat(torchjd), family="rival"),
            result("Laplace", flat(10.0), family="rival"),
            baseline="jacfunc",
        )
        for torchjd in (4.0, 5.0, 20.0)
    ]
    assert [against(case) for case in cases] == ["TorchJD", "TorchJD", "Laplace"]
    assert sentence(cases) == (
        "jacfunc is the fastest or ties with it in 3 of 3 cases, "
        "at 0.20 of the time of the fastest other (0.10 to 0.25)."
    )


def test_cases_without_a_rival_are_not_won():
    alone = [
        record(result("jacfunc", flat(size)), baseline="jacfunc", axis="batch", batch=size)
        for size in (1, 2, 4)
    ]
    assert sentence(alone) == "jacfunc has no rival here; its time grows as batch^1.00."
    both = record(result("jacfunc", flat(1.0)), result("other", flat(2.0)), baseline="jacfunc")
    assert "in 1 of 1 case" in sentence([*alone, both])


def test_jax_does_not_win_but_is_told_of():
    cases = [
        record(
            result("jacfunc", flat(0.5)),
            result(BASE, flat(1.0)),
            result("JAX jacrev", flat(took), family="JAX"),
        )
        for took in (0.1, 0.2, 0.9)
    ]
    assert [winners(case) for case in cases] == [["jacfunc"]] * 3
    assert sentence(cases).endswith("; compiled by JAX, 2 of 3 are faster still.")


def test_many_winners_are_counted_not_listed():
    cases = [
        record(result("jacfunc", flat(2.0)), result(name, flat(1.0)), result(BASE, flat(3.0)))
        for name in ("a", "a", "a", "b", "b", "c", "d")
    ]
    assert sentence(cases).endswith("; elsewhere the fastest is a in 3, b in 2, c in 1.")


# --- two runs ---


def run_of(*cases, **environment):
    return Run("full", environment, {}, {f"q/{name}": case for name, case in cases})


def measured(seed, slower=1.0, contestants=100):
    """A run in two processes, whose rounds are pooled; each contestant in a case of its own."""
    numbers = count(seed * 1000)

    def noisy(ratio):
        offsets = (drawn(next(numbers), 2) * BETWEEN).exp().repeat_interleave(ROUNDS)
        return (ratio * offsets * (drawn(next(numbers), 2 * ROUNDS) * WITHIN).exp()).tolist()

    return run_of(
        *(
            (str(i), record(result("jacfunc", noisy(0.7 * slower)), result(BASE, flat(1.0, 80))))
            for i in range(contestants)
        )
    )


@pytest.mark.parametrize("seed", [1, 3])
def test_the_same_code_is_equivalent_in_95_of_100(seed):
    found = compare(measured(seed), measured(seed + 1))
    assert found.counts["equivalent"] >= 95
    assert found.counts["baseline"] == 100


@pytest.mark.parametrize(("slower", "verdict"), [(1.2, "regressed"), (1 / 1.2, "improved")])
def test_a_planted_fifth_is_found_in_95_of_100(slower, verdict):
    found = compare(measured(5), measured(6, slower))
    assert found.counts[verdict] >= 95
    assert len(found.regressed) == (found.counts["regressed"])


def test_a_slower_machine_is_no_regression():
    halved = record(result("jacfunc", flat(2 * 0.7)), result(BASE, flat(2 * 1.0)))
    before = record(result("jacfunc", flat(0.7)), result(BASE, flat(1.0)))
    ours, base = compare(run_of(("a", before)), run_of(("a", halved))).changes
    assert (ours.verdict, base.verdict) == ("equivalent", "baseline")
    assert base.interval.mid == pytest.approx(2)


def test_what_became_slower_is_ours_though_others_are_measured_by_it():
    before, after = (
        record(
            result("jacfunc", flat(took)),
            result("TorchJD", flat(3.0), family="rival"),
            result("recipe", flat(4.0, 12), family="torch.func"),
            baseline="jacfunc",
        )
        for took in (1.0, 1.5)
    )
    found = {
        c.contestant: c.verdict
        for c in compare(run_of(("a", before)), run_of(("a", after))).changes
    }
    assert found == {"jacfunc": "regressed", "TorchJD": "equivalent", "recipe": "baseline"}


def test_what_other_processes_took_is_no_regression():
    def loaded(clock, processor):
        ours = result("jacfunc", flat(clock)) | {"busy": dict.fromkeys("123", processor)}
        return record(ours, result(BASE, flat(1.0)) | {"busy": dict.fromkeys("123", 1.0)})

    def verdict_of(before, after):
        return compare(run_of(("a", before)), run_of(("a", after))).changes[0].verdict

    assert verdict_of(loaded(0.7, 0.7), loaded(1.4, 0.7)) == "equivalent"
    assert verdict_of(loaded(0.7, 0.7), loaded(0.7, 1.4)) == "regressed"
    old = record(result("jacfunc", flat(0.7)), result(BASE, flat(1.0)))
    assert verdict_of(old, loaded(1.4, 0.7)) == "regressed"


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0.98, 1.01, 1.04), "equivalent"),
        ((0.95, 1.05, 1.15), "equivalent"),  # not surely within a tenth, but surely no fifth
        ((0.90, 1.05, 1.25), "inconclusive"),
        ((0.95, 1.15, 1.30), "inconclusive"),
        ((1.05, 1.15, 1.30), "regressed"),
        ((0.70, 0.80, 0.95), "improved"),
        ((1.30, 1.30, 1.30), "regressed"),
    ],
)
def test_judgements(interval, expected):
    assert judge(Interval(*interval)) == expected


def test_statuses_that_change_and_what_one_run_lacks():
    before = record(
        result(BASE, flat(1.0)),
        result("breaks", flat(1.0)),
        result("mends", {}, status="out of memory"),
        result("fails", {}, status="unsupported: x"),
        result("gone", flat(1.0)),
        result("absent", flat(1.0)),
    )
    after = record(
        result(BASE, flat(1.0)),
        result("breaks", {}, status="wrong: by 3"),
        result("mends", flat(1.0)),
        result("fails", {}, status="unsupported: x"),
        result("absent", {}, status="not installed: No module named 'absent'"),
        result("new", flat(1.0)),
    )
    found = compare(run_of(("a", before), ("b", before)), run_of(("a", after), ("c", after)))
    assert {c.contestant: c.verdict for c in found.changes} == {
        BASE: "baseline",
        "breaks": "broke",
        "mends": "mended",
        "fails": "fails",
    }
    assert [change.contestant for change in found.regressed] == ["breaks"]
    assert found.only_first == ("q/a: gone", "q/a: absent", "q/b")
    assert found.only_second == ("q/a: new", "q/c")
    assert table_of(found).row_count == 2
    assert table_of(found, everything=True).row_count == 4
    assert "only in the first: q/a: gone" in table_of(found).caption


def test_other_machines_are_warned_of():
    one = {"device_name": "A", "torch": "2.13.0", "threads": 1}
    assert compare(run_of(**one), run_of(**one)).warning == ""
    warning = compare(run_of(**one), run_of(**{**one, "threads": 2})).warning
    assert warning == "Not made alike: threads 1 and 2."
