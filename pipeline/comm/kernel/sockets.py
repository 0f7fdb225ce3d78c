"""What the kernel says about this process's own TCP connections: addresses, bytes handed over, retransmissions.

Read with `getsockopt(TCP_INFO)` on the process's own descriptors, which needs neither rights nor a second program, and
sees no other process's traffic: neither data loading nor uploads.
"""

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Offsets into struct tcp_info, <linux/tcp.h>. The fields up to tcpi_bytes_retrans exist since Linux 4.19.
_TIMEOUTS, _OPTIONS, _SEGS_OUT, _NOTSENT, _BYTES_SENT, _END_OF_BYTES_RETRANS = 2, 5, 136, 144, 200, 216
_DSACK_DUPS, _RCV_OOOPACK, _TCP_INFO_BYTES = 216, 224, 232  # the second since Linux 5.4
_OPTION_TIMESTAMPS = 1


@dataclass(frozen=True, slots=True)
class TcpCounts:
    """What one connection has sent since it was opened."""

    sent_bytes: int
    """Bytes handed to TCP: each once, those still in the socket's buffer included."""
    retransmitted_bytes: int
    """Bytes sent again."""
    unsent_bytes: int
    """Bytes of `sent_bytes` that are still in the socket's buffer."""
    segments: int
    """Segments sent, acknowledgements without data included."""
    has_timestamps: bool
    """Whether each segment carries TCP's timestamp option."""
    is_disturbed: bool = False
    """Whether anything was sent again, or arrived twice or out of order: then segments carry selective
    acknowledgements, too."""
    num_timeouts: int = 0
    """How many times in a row what was sent last was sent again in vain."""

    @property
    def on_wire_bytes(self) -> int:
        """Data bytes that have left through the card, those sent again included."""
        return self.sent_bytes - self.unsent_bytes + self.retransmitted_bytes


@dataclass(frozen=True, slots=True)
class Connection:
    """A TCP connection of this process."""

    descriptor: int
    inode: int
    """Inode of the socket: a descriptor's number is used again, this is not."""
    family: int
    local: tuple[str, int]
    """(address, port); IPv4 addresses in IPv6 form are written as IPv4."""
    remote: tuple[str, int]

    def counts(self) -> TcpCounts | None:
        """Read the kernel's counts; None if the connection is gone or this kernel is too old to count bytes."""
        try:
            if os.fstat(self.descriptor).st_ino != self.inode:  # closed, and the number is another file's
                return None
            handle = socket.socket(self.family, socket.SOCK_STREAM, 0, fileno=self.descriptor)
        except OSError:
            return None
        try:
            return parse_tcp_info(handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES))
        except OSError:
            return None
        finally:
            handle.detach()  # the descriptor is not ours to close


def parse_tcp_info(info: bytes) -> TcpCounts | None:
    """Read `struct tcp_info` as the kernel returns it; None if it is too short to hold byte counts (before Linux 4.19).

    tcpi_bytes_sent counts data octets, retransmitted ones again (RFC 4898, tcpEStatsPerfHCDataOctetsOut).
    """
    if len(info) < _END_OF_BYTES_RETRANS:
        return None
    (segments,) = struct.unpack_from("I", info, _SEGS_OUT)
    (unsent,) = struct.unpack_from("I", info, _NOTSENT)
    sent, retransmitted = struct.unpack_from("QQ", info, _BYTES_SENT)
    whole = info.ljust(_TCP_INFO_BYTES, b"\0")
    disturbances = [struct.unpack_from("I", whole, at)[0] for at in (_DSACK_DUPS, _RCV_OOOPACK)]
    return TcpCounts(
        sent_bytes=sent - retransmitted + unsent,
        retransmitted_bytes=retransmitted,
        unsent_bytes=unsent,
        segments=segments,
        has_timestamps=bool(info[_OPTIONS] & _OPTION_TIMESTAMPS),
        is_disturbed=any((retransmitted, *disturbances)),
        num_timeouts=info[_TIMEOUTS],
    )


def own_connections() -> list[Connection]:
    """Return this process's connected TCP sockets, each once however many descriptors it has."""
    found: dict[int, Connection] = {}
    for descriptor, inode in _socket_descriptors():
        if inode in found:
            continue
        connection = _connection(descriptor, inode)
        if connection is not None:
            found[inode] = connection
    return list(found.values())


def _socket_descriptors() -> Iterator[tuple[int, int]]:
    for path in Path("/proc/self/fd").iterdir():
        try:
            target = str(path.readlink())
        except OSError:  # closed since it was listed
            continue
        if target.startswith("socket:["):
            yield int(path.name), int(target[len("socket:[") : -1])


def _connection(descriptor: int, inode: int) -> Connection | None:
    try:
        handle = socket.socket(fileno=descriptor)
    except OSError:
        return None
    try:
        if handle.type != socket.SOCK_STREAM or handle.family not in (socket.AF_INET, socket.AF_INET6):
            return None
        local, remote = handle.getsockname(), handle.getpeername()
    except OSError:  # listening, or not connected
        return None
    finally:
        handle.detach()
    return Connection(descriptor, inode, handle.family, _endpoint(local), _endpoint(remote))


def _endpoint(address: tuple[str, int]) -> tuple[str, int]:
    return address[0].removeprefix("::ffff:"), address[1]
