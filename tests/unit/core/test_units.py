"""Numbers as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.units import MISSING, format_bandwidth, format_bytes, format_seconds, format_times, median


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (4_993_696, "4.99 MB"),
        (244_403_360, "244.40 MB"),
        (999_995_000, "1.00 GB"),
        (553_430_176_000, "553.43 GB"),
        (None, MISSING),
    ],
)
def test_bytes_are_decimal(num_bytes: int | None, text: str) -> None:
    assert format_bytes(num_bytes) == text


@given(st.integers(0, 10**17))
def test_no_size_prints_more_than_three_digits_before_the_point(num_bytes: int) -> None:
    number, unit = format_bytes(num_bytes).split()
    assert float(number) < 1000
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}[unit]
    assert float(number) * scale == pytest.approx(num_bytes, rel=0.005)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00002, "20 µs"),
        (0.0032, "3.2 ms"),
        (0.176, "176 ms"),
        (1.239, "1.24 s"),
        (75, "75.0 s"),
        (725, "12 min 05 s"),
        (None, MISSING),
    ],
)
def test_seconds(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("bits_per_second", "text"),
    [(9600, "9.6 kbit/s"), (10**8, "100 Mbit/s"), (25 * 10**8, "2.5 Gbit/s"), (800, "800 bit/s"), (None, MISSING)],
)
def test_bandwidth(bits_per_second: int | None, text: str) -> None:
    assert format_bandwidth(bits_per_second) == text


def test_what_was_not_measured_is_a_dash_and_zero_is_not() -> None:
    assert format_times(None) == MISSING
    assert format_times(0.0) == "0.00×"


@given(st.lists(st.floats(-1e9, 1e9), min_size=1))
def test_median_has_as_many_below_as_above(values: list[float]) -> None:
    middle = median(values)
    assert middle is not None
    assert sum(v < middle for v in values) <= len(values) / 2
    assert sum(v > middle for v in values) <= len(values) / 2


def test_median_of_nothing() -> None:
    assert median([]) is None
