"""A link between two servers as `ready` measures it: said in a line, and read back from what it printed."""

import re
from dataclasses import dataclass

_LINE = re.compile(r"server\s(\d+)\sto\s(\d+):\s([\d.]+)\sGbit/s,\s([\d,]+)\sus\sthere\sand\sback")


@dataclass(frozen=True)
class MeasuredLink:
    """From one server to the next, measured while nothing else was on it."""

    sender: int
    receiver: int
    gigabits_per_second: float
    round_trip_microseconds: float
    """Of a message so small that its bytes do not count, through both hosts."""

    def __str__(self) -> str:
        return (
            f"server {self.sender} to {self.receiver}: {self.gigabits_per_second:.2f} Gbit/s,"
            f" {self.round_trip_microseconds:,.0f} us there and back"
        )


def parse_links(text: str) -> list[MeasuredLink]:
    """Return the links in what `ready` printed, in their order."""
    return [
        MeasuredLink(int(sender), int(receiver), float(rate), float(trip.replace(",", "")))
        for sender, receiver, rate, trip in _LINE.findall(text)
    ]
