"""A rank of the lab behind a link that falters: what `tc netem` does, for kernels that lack it, outside the kernel.

    pipeline.lab servers=N -- python faltering_link.py PLACE -- COMMAND ...

Before the command begins, this server's `eth0` becomes a tap device with the same name and addresses. A process carries
its frames to the lab's link and back, and does to those that leave the server what `PLACE/link.json` says:

    loss, duplicate, corrupt, reorder   share of frames; `corrupt` flips a bit, `reorder` holds a frame back
    delay_seconds                       for every frame
    bits_per_second                     the rate; 1,000 frames wait, the others are lost
    largest_frame                       larger ones are lost without a word, as behind a tunnel
    for_seconds                         for how long all this holds; without it, until the file changes

The file may change at any time. What happened is counted, by kind, in `PLACE/link.RANK.json`. Checksums are the
kernel's: it makes them before the tap and checks them behind it, as on a card that computes none itself.
"""

import contextlib
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

CARD, LINK = "eth0", "link0"
HELD_BACK_SECONDS = 0.02
LONGEST_QUEUE = 1000  # netem's own
LOOKS_EVERY_SECONDS = 0.05
TCP_SYN_OR_RESET = 0x02 | 0x04
ETH_P_ALL, PACKET_OUTGOING = 0x0003, 4
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


def ip(*words: object) -> None:
    """Run ip(8)."""
    subprocess.run(["ip", *map(str, words)], check=True)


def interpose(mtu: int) -> tuple[int, socket.socket]:
    """Put a tap device in the place of the lab's interface. Returns (the tap, the link)."""
    described = json.loads(subprocess.check_output(["ip", "-json", "address", "show", "dev", CARD]))[0]
    neighbours = json.loads(subprocess.check_output(["ip", "-json", "neighbour", "show", "dev", CARD]))
    (address,) = described["addr_info"]
    ip("link", "set", CARD, "down")
    ip("address", "flush", "dev", CARD)
    # Another hardware address: what comes for this server is the tap's, and not for the kernel to take from the link.
    ip("link", "set", CARD, "name", LINK, "address", f"06{described['address'][2:]}")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", CARD.encode(), IFF_TAP | IFF_NO_PI))
    ip("link", "set", CARD, "address", described["address"], "mtu", mtu, "txqueuelen", 10_000)
    subprocess.run(["ethtool", "-K", CARD, "gso", "off", "gro", "off"], check=True)
    ip("address", "add", f"{address['local']}/{address['prefixlen']}", "dev", CARD)
    ip("link", "set", CARD, "up")
    for other in neighbours:
        ip("neighbour", "add", other["dst"], "lladdr", other["lladdr"], "dev", CARD, "nud", "permanent")
    ip("link", "set", LINK, "promisc", "on", "up")
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    link.bind((LINK, 0))
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024**2)
    link.setblocking(False)
    return tap, link


class Conditions:
    """What the file says, as of now."""

    def __init__(self, path: Path) -> None:
        self._path, self._text, self._looked, self._until = path, "", 0.0, 0.0
        self._values: dict[str, Any] = {}

    def look(self, now: float) -> dict[str, Any]:
        """Read them again where that is due."""
        if now - self._looked > LOOKS_EVERY_SECONDS:
            self._looked = now
            text = self._path.read_text() if self._path.exists() else "{}"
            with contextlib.suppress(ValueError):  # half written
                if text != self._text:
                    self._values, self._text = json.loads(text), text
                    self._until = now + self._values.get("for_seconds", float("inf"))
        return self._values if now < self._until else {}


def options_of(frame: bytes) -> int:
    """Bytes of TCP's options in a frame beyond the time stamps that every segment carries; 0 in other frames.

    Of an open connection these are selective acknowledgements, 12, 20 or 28 bytes.
    """
    at = 14 + 4 * (frame[14] & 0x0F)
    if frame[12:14] != b"\x08\x00" or frame[23] != socket.IPPROTO_TCP or frame[at + 13] & TCP_SYN_OR_RESET:
        return 0
    return 4 * (frame[at + 12] >> 4) - 32


class Relay:
    """Carries frames."""

    def __init__(self, tap: int, link: socket.socket, place: Path, rank: str) -> None:
        self._tap, self._link, self._counts_file = tap, link, place / f"link.{rank}.json"
        self._conditions, self._chance = Conditions(place / "link.json"), random.Random(f"link {rank}")
        self._waiting: list[tuple[float, int, bytes]] = []  # (when it leaves, number, frame)
        self._number, self._free_at, self._noted = 0, 0.0, 0.0
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        """For ever: the lab ends it."""
        poll = select.poll()
        poll.register(self._tap, select.POLLIN)
        poll.register(self._link, select.POLLIN)
        while True:
            now = time.monotonic()
            left = self._waiting[0][0] - now if self._waiting else LOOKS_EVERY_SECONDS
            ready = {descriptor for descriptor, _ in poll.poll(1000 * min(max(left, 0.0), LOOKS_EVERY_SECONDS))}
            if self._tap in ready:
                self._take()
            if self._link.fileno() in ready:
                self._bring()
            self._let_go()
            self._note()

    def _take(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                self._leave(os.read(self._tap, 65536))

    def _bring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                frame, (_, _, kind, *_) = self._link.recvfrom(65536)
                if kind != PACKET_OUTGOING:
                    os.write(self._tap, frame)

    def _leave(self, frame: bytes) -> None:
        """Do to a frame what the conditions say."""
        now = time.monotonic()
        wanted = self._conditions.look(now)
        self.counts["frames"] += 1
        self.counts["option_bytes"] += options_of(frame)
        self.counts["longest_frame"] = max(len(frame), self.counts["longest_frame"])
        self.counts["for_seconds"] += "for_seconds" in wanted
        if self._happens(wanted, "loss"):
            return
        is_too_large = len(frame) > wanted.get("largest_frame", len(frame))
        self.counts["largest_frame"] += is_too_large
        if is_too_large:
            return
        if self._happens(wanted, "corrupt"):
            at = self._chance.randrange(8 * len(frame))
            frame = (int.from_bytes(frame, "little") ^ 1 << at).to_bytes(len(frame), "little")
        at = now + wanted.get("delay_seconds", 0.0)
        self.counts["delay_seconds"] += "delay_seconds" in wanted
        if self._happens(wanted, "reorder"):
            at += HELD_BACK_SECONDS
        if (rate := wanted.get("bits_per_second")) is not None:
            if len(self._waiting) >= LONGEST_QUEUE:
                self.counts["overflow"] += 1
                return
            self.counts["bits_per_second"] += 1
            at = self._free_at = max(at, self._free_at) + 8 * len(frame) / rate
        for _ in range(1 + self._happens(wanted, "duplicate")):
            self._number += 1
            heapq.heappush(self._waiting, (at, self._number, frame))

    def _happens(self, wanted: dict[str, Any], what: str) -> bool:
        happens = self._chance.random() < wanted.get(what, 0.0)
        self.counts[what] += happens
        return happens

    def _let_go(self) -> None:
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            try:
                self._link.send(self._waiting[0][2])
            except BlockingIOError:
                return
            heapq.heappop(self._waiting)

    def _note(self) -> None:
        now = time.monotonic()
        if now - self._noted > LOOKS_EVERY_SECONDS:
            self._noted = now
            new = self._counts_file.with_suffix(".new")
            new.write_text(json.dumps(self.counts))
            new.rename(self._counts_file)


def main(place: Path, command: list[str]) -> None:
    """Start the relay, which lasts as long as the lab, and become the command."""
    rank = os.environ["RANK"]
    mtus = json.loads(os.environ.get("LINK_MTUS", "{}"))
    tap, link = interpose(mtus.get(rank, 1500))
    if os.fork() == 0:
        os.setsid()  # a rank takes its process group with it; its last frames are still under way
        Relay(tap, link, place, rank).run()
    os.close(tap)
    link.close()
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:])
