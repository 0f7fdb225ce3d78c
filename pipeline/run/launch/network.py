"""Over which interface a rank exchanges gradients: settled, and refused where it cannot work, before torch tries.

gloo listens at the address of the interface that GLOO_SOCKET_IFNAME names, else at what the machine's own name stands
for. Debian and Ubuntu make that 127.0.1.1, where no other machine finds it: then the interface is taken that leads to
the other ranks.
"""

import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from pipeline.core.errors import ConfigError
from pipeline.run.launch.ranks import RankInfo

GLOO_VARIABLE, NCCL_VARIABLE = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
LOOPBACK = "lo"
ANY_PORT = 9  # nothing is sent there: the kernel only says which way it would go
MOST_PLACES = 8


@dataclass(frozen=True)
class Place:
    """Where a rank can be reached by the others."""

    rank: int
    host: str
    machine: str
    """The same for ranks that share a network namespace, and with it the loopback interface."""
    address: str | None
    """None: the machine's own name stands for no address of it."""
    interface: str | None = None
    """The interface that gloo is told; None: it takes the one of the machine's own name."""
    is_chosen: bool = False
    """Whether the user named the interface."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} at {self.address}{f' ({self.interface})' if self.interface else ''}"

    @property
    def is_reachable(self) -> bool:
        """Whether other machines may find this address."""
        return self.address is not None and not is_local(self.address)

    def to_json(self) -> dict[str, Any]:
        """Return the fields, as other ranks are told them."""
        return asdict(self)


def interfaces() -> dict[str, list[str]]:
    """Return the IP addresses of each interface of this machine that is up and has any."""
    families = (socket.AF_INET, socket.AF_INET6)
    stats = psutil.net_if_stats()
    found = {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
        if name in stats and "up" in stats[name].flags.split(",")
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def is_local(address: str) -> bool:
    """Whether an address means something on its own machine or link alone."""
    parsed = ipaddress.ip_address(address)
    return parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified


def check_variable(backend: str, environment: Mapping[str, str], found: Mapping[str, Sequence[str]]) -> None:
    """Refuse a variable that names an interface which is not there.

    Args:
        backend: `gloo` or `nccl`.
        environment: Variables of this process.
        found: Interfaces of this machine and their addresses.

    Raises:
        ConfigError: With the interfaces that there are.
    """
    variable = NCCL_VARIABLE if backend == "nccl" else GLOO_VARIABLE
    value = environment.get(variable, "")
    missing = _missing_nccl(value, found) if backend == "nccl" else _missing_gloo(value, found)
    if missing is None:
        return
    hint = ""
    if missing.startswith(("^", "=")):
        hint = f" ({missing[0]} in front is NCCL's way of choosing, gloo takes names alone)"
    elif holder := next((name for name, addresses in found.items() if missing in addresses), None):
        hint = f" (that is the address of {holder})"
    raise ConfigError(
        f"{variable}={value}: {socket.gethostname()} has no interface {missing!r} that is up and has an address{hint}."
        f" It has {_listed(found)}: set {variable} to one that every machine has, or unset it."
    )


def _missing_gloo(value: str, found: Mapping[str, Sequence[str]]) -> str | None:
    return next((name for name in value.split(",") if name not in found), None) if value else None


def _missing_nccl(value: str, found: Mapping[str, Sequence[str]]) -> str | None:
    """Of NCCL's forms (`eth,ib` beginnings of names, `=eth0` names, `^docker` all but these): what finds none."""
    names = value.lstrip("^=")
    kind = value.removesuffix(names)
    wanted = [name.partition(":")[0] for name in names.split(",") if name]
    if not wanted:
        return None

    def fits(name: str) -> bool:
        return any(name == one if "=" in kind else name.startswith(one) for one in wanted)

    return None if any(fits(name) != ("^" in kind) for name in found) else names


def _listed(found: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{name} ({addresses[0]})" for name, addresses in found.items()) or "none"


def check_loopback(ranks: RankInfo | None, found: Mapping[str, Sequence[str]]) -> None:
    """Refuse a machine whose ranks meet on it where it cannot reach itself.

    Args:
        ranks: The place of this process among all; None: it starts them.
        found: Interfaces of this machine and their addresses.

    Raises:
        ConfigError: The loopback interface is down.
    """
    if (ranks is None or ranks.is_first or ranks.num_nodes == 1) and "127.0.0.1" not in found.get(LOOPBACK, ()):
        raise ConfigError(
            f"The loopback interface of {socket.gethostname()} is down, and ranks meet over it: `ip link set lo up`"
            " as root, or start with a network namespace that has it up."
        )


def find_place(ranks: RankInfo, environment: Mapping[str, str], found: Mapping[str, Sequence[str]]) -> Place:
    """Find where this rank would be reached, as far as it can tell alone.

    Args:
        ranks: The place of this process among all.
        environment: Variables of this process, which are sound.
        found: Interfaces of this machine and their addresses.

    Returns:
        The place, which may be of no use to others: see `settle`.
    """
    host = socket.gethostname()
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    machine = f"{boot.read_text().strip()} {namespace.readlink()}" if namespace.exists() else host
    unknown = Place(ranks.rank, host, machine, None)
    if named := environment.get(GLOO_VARIABLE, "").split(",")[0]:
        return replace(unknown, address=found[named][0], interface=named, is_chosen=True)
    of_name = replace(unknown, address=_address_of_name(host))
    towards = _towards(ranks.master_addr, of_name, found)
    return towards if not of_name.is_reachable and towards.is_reachable else of_name


def settle(place: Place, places: Sequence[Place], found: Mapping[str, Sequence[str]]) -> Place:
    """Settle where this rank is reached, now that it knows of the others.

    Args:
        place: Of this rank.
        places: Of all ranks, as each found it alone.
        found: Interfaces of this machine and their addresses.

    Returns:
        The place, reachable by all.

    Raises:
        ConfigError: It can be reached from its own machine alone, and others are elsewhere.
    """
    others = [other for other in places if other.machine != place.machine]
    if not others:
        # No other machine need hear of it, nor be able to knock there.
        return (
            place
            if place.is_chosen and place.address
            else replace(place, address=found[LOOPBACK][0], interface=LOOPBACK)
        )
    for other in others:
        if not place.is_reachable and not place.is_chosen and other.address and other.is_reachable:
            place = _towards(other.address, place, found)
    if place.is_reachable:
        return place
    outward = {name: addresses for name, addresses in found.items() if not is_local(addresses[0])}
    raise ConfigError(
        f"R{str(place)[1:]} is reached from its own machine alone, but rank {others[0].rank} is on"
        f" {others[0].host}: set {GLOO_VARIABLE} to the interface between the machines ({_listed(outward)})."
    )


def check_apart(places: Sequence[Place]) -> None:
    """Refuse machines with one address.

    Raises:
        ConfigError: As the bridges of docker or virtual machines have it, the same on every machine.
    """
    first: dict[str | None, Place] = {}
    for place in places:
        before = first.setdefault(place.address, place)
        if before.machine != place.machine:
            raise ConfigError(
                f"R{str(before)[1:]} and {place} have one address: set {GLOO_VARIABLE} to the interface that"
                " is between the machines."
            )


def tell(places: Sequence[Place]) -> str:
    """Return the places in words, the first few of many."""
    more = f" and {len(places) - MOST_PLACES} more" if len(places) > MOST_PLACES else ""
    return ", ".join(map(str, places[:MOST_PLACES])) + more


def use(place: Place) -> None:
    """Tell gloo the interface, where it would not take it by itself."""
    if place.interface is not None:
        os.environ.setdefault(GLOO_VARIABLE, place.interface)


def _address_of_name(host: str) -> str | None:
    """As torch does it: the first address of the machine's own name that this machine has."""
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in answers:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind((address[0], 0, *address[2:]))
            except OSError:
                continue
            return str(address[0]).partition("%")[0]
    return None


def _towards(host: str, place: Place, found: Mapping[str, Sequence[str]]) -> Place:
    """Return `place` with the address and interface from which this machine would reach `host`, if it would."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            own = str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return place
    interface = next((name for name, addresses in found.items() if own in addresses), None)
    return replace(place, address=own, interface=interface) if interface else place
