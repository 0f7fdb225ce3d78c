"""A link between two servers as `ready` measures it: said in a line, and read back from what it printed."""

import re
from dataclasses import dataclass

from pipeline.core.units import PREFIXES, format_bandwidth, format_rate

_BEGIN = re.compile(r"server\s\d+\sto\s\d+:")
_LINE = re.compile(
    r"server\s(\d+)\sto\s(\d+):\s(\d+(?:\.\d+)?)\s([kMGTP]?)bit/s,"
    r"\s(\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?)\sus\sthere\sand\sback"
)


@dataclass(frozen=True)
class MeasuredLink:
    """From one server to the next, measured while nothing else was on it."""

    sender: int
    receiver: int
    bits_per_second: float
    round_trip_microseconds: float
    """Of a message so small that its bytes do not count, through both hosts."""

    def __str__(self) -> str:
        return (
            f"server {self.sender} to {self.receiver}: {format_bandwidth(self.bits_per_second)},"
            f" {format_rate(self.round_trip_microseconds)} us there and back"
        )


def parse_links(text: str) -> list[MeasuredLink]:
    """Return the links in what `ready` printed, in their order.

    Raises:
        ValueError: A line begins as that of a link and does not go on as one, or says 0.
    """
    links: list[MeasuredLink] = []
    for begin in _BEGIN.finditer(text):
        found = _LINE.match(text, begin.start())
        line = text[begin.start() :].partition("\n")[0].rstrip()
        if found is None:
            raise ValueError(f"{line!r} is no link as it prints them")
        sender, receiver, rate, prefix, trip = found.groups()
        link = MeasuredLink(
            int(sender), int(receiver), float(rate) * 1000 ** PREFIXES.index(prefix), float(trip.replace(",", ""))
        )
        if link.bits_per_second < 1 or not link.round_trip_microseconds:
            raise ValueError(f"{line!r} tells of no rate or no time, too small for the digits that were printed")
        links.append(link)
    return links
