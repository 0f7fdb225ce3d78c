"""Below which bandwidth the smaller of two models trains faster per picture: a column of the comparison."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.comparison.rows import Outcome
from pipeline.core.errors import ConfigError
from pipeline.forecasting.grid import break_even_bandwidth
from pipeline.forecasting.source import Source, read_source

KEY = "break_even_bandwidth_bits_per_second"


def fill(rows: Sequence[dict[str, Any]], outcomes: Sequence[Outcome], base: Mapping[str, Any]) -> dict[str, str]:
    """Set KEY of every row: below that bandwidth whichever of it and `base` carries less trains faster per picture.

    Each row's own measured run is forecast for links of other bandwidths, servers and all else as they were. Returns
    why a measured row has none, by its path.
    """
    sources = [_source(outcome) for outcome in outcomes]
    of_base = sources[next(index for index, row in enumerate(rows) if row is base)]
    reasons = {}
    for index, (row, source) in enumerate(zip(rows, sources, strict=True)):
        if row.get("reason"):
            continue
        row[KEY], why = (None, "It is the baseline.") if row is base else _between(row, source, base, of_base)
        if why:
            reasons[f"models.{index}.{KEY}"] = why
    return reasons


def _source(outcome: Outcome) -> Source | str:
    """The run, ready to be forecast, or why it is not."""
    if outcome.run is None:
        return f"{outcome.name} was not measured."
    try:
        return read_source(outcome.run, None)
    except ConfigError as error:
        return str(error)


def _between(
    row: Mapping[str, Any], source: Source | str, base: Mapping[str, Any], of_base: Source | str
) -> tuple[float | None, str | None]:
    for found in (source, of_base):
        if isinstance(found, str):
            return None, found
    assert isinstance(source, Source) and isinstance(of_base, Source)
    is_lighter = row["payload_bytes_per_step"] < base["payload_bytes_per_step"]
    return break_even_bandwidth(source, of_base) if is_lighter else break_even_bandwidth(of_base, source)
