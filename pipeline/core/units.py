"""Numbers as people read them. A value that was not measured is None and prints as a dash, never as 0."""

import math
import re

from pipeline.core.errors import ConfigError

MISSING = "–"
PREFIXES = ("", "k", "M", "G", "T", "P")


def format_bytes(num_bytes: float | None) -> str:
    """`4.99 MB`. Decimal prefixes: 1 kB = 10^3 bytes, 1 GB = 10^9 bytes."""
    if num_bytes is None:
        return MISSING
    power = 0
    value = float(num_bytes)
    # 999.995 would round to 1000.00, which belongs to the next prefix.
    while abs(value) >= (999.995 if power else 1000) and power < len(PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.2f} {PREFIXES[power]}B" if power else f"{value:.0f} B"


def format_seconds(seconds: float | None) -> str:
    """`20 µs`, `7.3 ms`, `176 ms`, `1.24 s`, `75.0 s`, `12 min 05 s`."""
    if seconds is None:
        return MISSING
    if 0 < seconds < 0.0000995:
        return f"{float(f'{seconds * 1e6:.2g}'):g} µs"
    if seconds < 0.0995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 119.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def format_count(count: int | None) -> str:
    """`1,248,424`."""
    return MISSING if count is None else f"{count:,}"


def format_rate(rate: float | None) -> str:
    """Something per second, three significant digits, thousands grouped."""
    if rate is None:
        return MISSING
    return f"{rate:,.0f}" if rate >= 99.95 else f"{rate:#.3g}"


def format_bandwidth(bits_per_second: float | None) -> str:
    """`1 Gbit/s`, `2.5 Gbit/s`, `137 Mbit/s`: three significant digits."""
    if bits_per_second is None:
        return MISSING
    power = 0
    while bits_per_second >= 1000 and power < len(PREFIXES) - 1:
        bits_per_second, power = bits_per_second / 1000, power + 1
    return f"{float(f'{bits_per_second:.3g}'):g} {PREFIXES[power]}bit/s"


def format_times(factor: float | None) -> str:
    """`48.94×`."""
    return MISSING if factor is None else f"{factor:,.2f}×"


def format_percent(fraction: float | None) -> str:
    """A fraction of one as `41.4 %`."""
    return MISSING if fraction is None else f"{fraction * 100:.1f} %"


def format_accuracy(fraction: float | None) -> str:
    """A top-1 or top-5, given as a fraction of one, as papers print it: `58.09 %`."""
    return MISSING if fraction is None else f"{fraction * 100:.2f} %"


def median(values: list[float]) -> float | None:
    """Middle value; the mean of the two middle ones for an even number; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return low if low == high else math.fsum((low, high)) / 2


# tc reads `mbps` as megabytes per second, which most people do not mean: units of bits only.
UNITS = {
    prefix + "bit": factor
    for prefixes, base in ((("", "k", "m", "g", "t"), 1000), (("", "ki", "mi", "gi", "ti"), 1024))
    for prefix, factor in zip(prefixes, (base**power for power in range(5)), strict=True)
}


def bits_per_second(rate: str) -> int:
    """`1gbit`, `100mbit`, `2.5gbit`: tc's units of bits, and a bare number of bits per second.

    Raises:
        ConfigError: not such a rate.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]*)", rate.strip().lower())
    unit = match[2] if match else ""
    if match is None or (unit and unit not in UNITS) or not 1 <= float(match[1]) * UNITS.get(unit, 1) < math.inf:
        hint = ": tc takes that for bytes per second" if unit.endswith("bps") else ""
        raise ConfigError(f"bandwidth={rate} is not a rate such as 1gbit, 100mbit or 2.5gbit{hint}.")
    return round(float(match[1]) * UNITS.get(unit, 1))
