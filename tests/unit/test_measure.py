"""Timing: interleaved rounds, the two ratios, and a child's peak memory."""

import statistics
import time

import pytest
import torch

from recompile.measure import Comparison, Timing, interleave, own_peak_mib, peak_memory_mib


def comparison(base, new):
    return Comparison({"base": Timing("base", tuple(base)), "new": Timing("new", tuple(new))})


def test_ratio_is_of_the_medians():
    assert comparison([2.0, 4.0, 100.0], [1.0, 2.0, 50.0]).ratio("base", "new") == 2.0


def test_round_ratio_ignores_a_drift_that_hits_both():
    drifting = comparison([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert drifting.round_ratio("base", "new") == 2.0


def test_spread_is_the_interquartile_range_over_the_median():
    assert Timing("x", (1.0, 2.0, 3.0, 4.0, 5.0)).spread == pytest.approx(2 / 3)
    assert Timing("x", (1.0,)).spread == 0.0


def test_every_callable_runs_in_every_round():
    result = interleave({"a": lambda: None, "b": lambda: None}, seconds=0, min_rounds=7)
    assert [len(timing.seconds) for timing in result.timings.values()] == [7, 7]


def test_a_slower_callable_is_seen_as_slower():
    result = interleave({"slow": lambda: time.sleep(4e-3), "fast": lambda: time.sleep(1e-3)}, seconds=0.05)
    assert result.ratio("slow", "fast") > 1.5
    assert result.timings["slow"].median_ms == pytest.approx(
        1e3 * statistics.median(result.timings["slow"].seconds)
    )


def test_threads_are_fixed_inside_and_restored_after():
    before, seen = torch.get_num_threads(), []
    interleave({"x": lambda: seen.append(torch.get_num_threads())}, seconds=0, threads=1)
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


def test_no_callables_is_an_error():
    with pytest.raises(ValueError, match="at least one callable"):
        interleave({})


def test_peak_memory_of_a_child_sees_its_allocation():
    code = "x = bytearray({} << 20); from recompile.measure import own_peak_mib as p; print(p())"
    small, large = (peak_memory_mib("-c", code.format(mib)) for mib in (1, 200))
    assert large - small > 150
    assert own_peak_mib() > 50


def test_peak_memory_reports_the_childs_error():
    with pytest.raises(RuntimeError, match="no such thing"):
        peak_memory_mib("-c", "raise SystemExit('no such thing')")
