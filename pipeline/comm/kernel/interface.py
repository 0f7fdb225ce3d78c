"""The network card's counters, and what they count.

An interface counter holds everything: every process, every header, acknowledgements. With segmentation offload it
counts what the kernel hands to the card, super-packets of up to 64 KiB with one header each; without, wire frames.
Whether a physical card's driver counts before or after cutting is the driver's affair: calibrate with a known transfer.
"""

import ctypes
import fcntl
import socket
import struct
from dataclasses import dataclass

import psutil

# <linux/sockios.h>, <linux/ethtool.h>
_SIOCETHTOOL, _ETHTOOL_GTSO, _ETHTOOL_GGSO = 0x8946, 0x1E, 0x23


@dataclass(frozen=True, slots=True)
class InterfaceCounts:
    """What an interface has sent since it exists. Without preamble, frame check sequence and gap of Ethernet."""

    tx_bytes: int
    tx_packets: int


def read_interface(name: str) -> InterfaceCounts | None:
    """Read an interface of this process's network namespace; None if it has no such interface.

    psutil reads /proc/net/dev, which is the process's own; /sys/class/net may belong to another namespace.
    """
    counters = psutil.net_io_counters(pernic=True).get(name)
    return None if counters is None else InterfaceCounts(counters.bytes_sent, counters.packets_sent)


def interface_of_address(address: str) -> str | None:
    """Return the name of the interface that carries a local address; None if no interface has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None


def segmentation_offload(name: str) -> bool | None:
    """Tell whether the kernel leaves cutting into segments to this interface (TSO or GSO); None if it does not say."""
    answers = [_ethtool_value(name, command) for command in (_ETHTOOL_GTSO, _ETHTOOL_GGSO)]
    return None if None in answers else any(answers)


def _ethtool_value(name: str, command: int) -> int | None:
    """Ask for one `struct ethtool_value`, which the kernel fills in where the request points to."""
    value = bytearray(struct.pack("II", command, 0))
    memory = (ctypes.c_char * len(value)).from_buffer(value)
    request = struct.pack("16sP16x", name.encode()[:15], ctypes.addressof(memory))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        try:
            fcntl.ioctl(handle, _SIOCETHTOOL, request)
        except OSError:
            return None
    return struct.unpack("II", bytes(memory))[1]
