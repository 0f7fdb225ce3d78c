"""Below which bandwidth the smaller of two models trains faster per picture: a column of the comparison."""

from dataclasses import dataclass
from functools import cached_property

from pipeline.comparison.outcome import Outcome
from pipeline.core.errors import ConfigError
from pipeline.core.missing import Missing
from pipeline.forecasting.grid import break_even_bandwidth
from pipeline.forecasting.source import Source, read_source


@dataclass(frozen=True)
class Baseline:
    """The outcome that the others are multiples of."""

    outcome: Outcome

    @cached_property
    def source(self) -> Source | Missing:
        """Run of the baseline, ready to be forecast, or why it is not."""
        return _source(self.outcome)


def break_even(outcome: Outcome, baseline: Baseline) -> float | Missing:
    """Bits per second below which whichever of the two carries less trains faster per picture, or why there are none.

    Each of the two measured runs is forecast for links of other bandwidths, servers and all else as they were.
    """
    if outcome is baseline.outcome:
        return Missing("It is the baseline.")
    source, of_base = _source(outcome), baseline.source
    for found in (source, of_base):
        if isinstance(found, Missing):
            return found
    assert isinstance(source, Source) and isinstance(of_base, Source)
    is_lighter = _carried(outcome) < _carried(baseline.outcome)
    return break_even_bandwidth(source, of_base) if is_lighter else break_even_bandwidth(of_base, source)


def _source(outcome: Outcome) -> Source | Missing:
    if outcome.run is None:
        return Missing(f"{outcome.name} was not measured.")
    try:
        return read_source(outcome.run, None)
    except ConfigError as error:
        return Missing(str(error))


def _carried(outcome: Outcome) -> float:
    carried = outcome.run and outcome.run.carried_bytes_per_step
    assert carried is not None  # a run that timed its buckets recorded their collectives
    return carried
