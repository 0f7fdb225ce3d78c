"""A cluster on one machine: each server is a network namespace with an address and a shaped link to one switch.

This process's own network namespace holds the switch, a bridge. Each server has one interface, `eth0`, whose other end
is a port of the bridge. Both directions of a link are shaped alike, by a token bucket at its sending end. Address
resolution is fixed beforehand, so that an interface counts what the ranks send and nothing else.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import ConfigError
from pipeline.core.processes import our_module
from pipeline.run.lab import namespaces
from pipeline.run.launch.children import RankCommand
from pipeline.run.launch.ranks import LAB_VARIABLE, LabJson
from pipeline.run.launch.secret import SECRET_VARIABLE, new_secret
from pipeline.run.launch.supervisor import threads_of_a_rank

INTERFACE = "eth0"
SUBNET = "10.77.0"  # seen by nobody outside: it may be in use on the machine as well
MASTER_PORT = 29500  # any will do where nothing else listens
FRAME_HEADER_BYTES = 66  # Ethernet 14, IPv4 20, TCP with timestamps 32
# The token bucket. A bucket emptied more often than the kernel's timer wakes it does not reach its rate (64 kB at
# 1 Gbit/s: 8 % short on a virtual machine); a larger one lets more through at once. A super-packet must fit.
BURST_SECONDS = 0.002
LEAST_BURST_BYTES = 16_384
LEAST_BURST_BYTES_WITH_OFFLOADS = 65_536
QUEUE_SECONDS = 0.4
LEAST_QUEUE_BYTES = 4 * 1024**2
STILL_SECONDS = 0.05
SETTLE_SECONDS = 2.0
PACKAGES = {
    "ip": "iproute2",
    "tc": "iproute2",
    "bridge": "iproute2",
    "ethtool": "ethtool",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
}
HOSTS = Path("/etc/hosts")
SYSTEM_DIRECTORIES = ("/usr/sbin", "/sbin")  # not on the PATH of ordinary users of Debian


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which rank sits where, and what the servers' links are like."""

    servers: int
    ranks_per_server: int
    placement: str = "contiguous"
    """How ranks are dealt out. 4 ranks on 2 servers: `contiguous` 0,1|2,3; `interleaved` 0,2|1,3."""
    bandwidth_bits_per_second: int | None = None
    """Bandwidth of each link, in each direction. None: as fast as the machine."""
    offloads: bool = False
    """Whether packets leave a server whole (TSO, GSO, GRO) and are counted so, instead of as the frames of a wire."""

    @property
    def world_size(self) -> int:
        """Number of ranks of all servers."""
        return self.servers * self.ranks_per_server

    def place(self, rank: int) -> tuple[int, int]:
        """Return (server, local rank) of a rank, both from 0."""
        if self.placement == "interleaved":
            return rank % self.servers, rank // self.servers
        return divmod(rank, self.ranks_per_server)

    @property
    def server_of_rank(self) -> list[int]:
        """The server of every rank."""
        return [self.place(rank)[0] for rank in range(self.world_size)]

    def promise(self) -> LabJson:
        """Return what a rank may rely on, as SQUEEZEWIRE_LAB and lab.json have it."""
        return {
            "servers": self.servers,
            "ranks_per_server": self.ranks_per_server,
            "placement": self.placement,
            "server_of_rank": self.server_of_rank,
            "bandwidth_bits_per_second": self.bandwidth_bits_per_second,
            "offloads": self.offloads,
            "interface": INTERFACE,
        }

    def variables(self, rank: int) -> dict[str, str]:
        """Return the variables that give a rank its place, as torchrun does."""
        server, local_rank = self.place(rank)
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_server),
            "GROUP_RANK": str(server),
            "MASTER_ADDR": address_of(self.place(0)[0]),
            "MASTER_PORT": str(MASTER_PORT),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "NCCL_SOCKET_IFNAME": INTERFACE,
            "NCCL_HOSTID": name_of(server),  # else NCCL takes all servers for this machine and goes round the links
            LAB_VARIABLE: json.dumps(self.promise()),
        }


@dataclass(frozen=True)
class Counters:
    """What one interface has counted since the lab began."""

    server: int
    interface: str
    address: str
    tx_bytes: int
    tx_packets: int
    rx_bytes: int
    rx_packets: int


@dataclass(frozen=True)
class Lab:
    """A built cluster."""

    layout: Layout
    keepers: tuple[namespaces.Keeper, ...]
    """One per server: its process."""
    own_processes: bool
    """Whether everything started here is in a process table of its own."""

    def commands(
        self, command: Sequence[str], environment: Mapping[str, str], num_threads: int | None
    ) -> list[RankCommand]:
        """Make the command of every rank.

        Args:
            command: What to run; `python` is the interpreter of this process, `squeezewire` this program.
            environment: Variables of the ranks, beside those that give them their place.
            num_threads: Compute threads per rank; None: as `threads_of_a_rank` chooses.

        Returns:
            The commands in the order of the ranks.

        Raises:
            ConfigError: There is no such program.
        """
        named = {"python": [sys.executable], "squeezewire": our_module("pipeline")}.get(command[0])
        program = named or [found for found in [shutil.which(command[0])] if found]
        if not program:
            raise ConfigError(f"{command[0]} is not a program: the lab runs what follows `--` on every rank.")
        threads = threads_of_a_rank(self.layout.world_size, num_threads, environment)
        alike = {**environment, "OMP_NUM_THREADS": threads, SECRET_VARIABLE: new_secret()}
        inside = ["unshare", *namespaces.OWN_PROC, "--"] if self.own_processes else []
        return [
            RankCommand(
                [*_enter(self.keepers[self.layout.place(rank)[0]]), *inside, *program, *command[1:]],
                {**alike, **self.layout.variables(rank)},
            )
            for rank in range(self.layout.world_size)
        ]

    def counters(self) -> list[Counters]:
        """Read every server's interface, as soon as the counts stand still, at the latest after SETTLE_SECONDS.

        Closed connections send a last packet after their processes have ended, and a slow link has its queue.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        now = self._read()
        while True:
            time.sleep(STILL_SECONDS)
            before, now = now, self._read()
            if now == before or time.monotonic() > deadline:
                return now

    def _read(self) -> list[Counters]:
        return [_read_counters(server, keeper) for server, keeper in enumerate(self.keepers)]


@contextlib.contextmanager
def open_lab(layout: Layout) -> Iterator[Lab]:
    """Build the cluster; it is gone after the block, or with this process. A process can do so once.

    Args:
        layout: Servers, ranks and links.

    Yields:
        The cluster, ready to run commands.

    Raises:
        ConfigError: A tool is missing, or the kernel lacks something or does not permit it.
    """
    if sys.platform != "linux":
        raise ConfigError(f"The lab is made of Linux network namespaces, which {sys.platform} does not have.")
    _extend_path()
    check_tools(layout)
    with contextlib.ExitStack() as stack:
        namespaces.enter_network()
        _name_servers(layout)
        # Without snooping: a bridge that snoops joins a multicast group, and says so to every server.
        _build("link add br0 type bridge mcast_snooping 0", "the kernel needs its bridge module", "ip")
        _build("link set br0 up", "", "ip")
        keepers = []
        for server in range(layout.servers):
            keepers.append(namespaces.keep_network())
            stack.callback(namespaces.release, keepers[server])
            _connect(server, keepers[server], layout)
        # Last: the tools above name processes by the numbers this process knows them under.
        processes = namespaces.enter_processes()
        stack.callback(namespaces.release, processes or namespaces.sweep_after(keepers))
        yield Lab(layout, tuple(keepers), processes is not None)


def check_tools(layout: Layout) -> None:
    """Raise ConfigError naming the packages of missing command line tools."""
    unneeded = {"tc"} if layout.bandwidth_bits_per_second is None else set()
    unneeded |= {"ethtool"} if layout.offloads else set()
    missing = [tool for tool in PACKAGES if tool not in unneeded and shutil.which(tool) is None]
    if missing:
        packages = " ".join(dict.fromkeys(PACKAGES[tool] for tool in missing))
        raise ConfigError(f"The lab needs {', '.join(missing)}, not found here: apt-get install {packages}.")


def address_of(server: int) -> str:
    """Return the address of a server's interface."""
    return f"{SUBNET}.{server + 1}"


def name_of(server: int) -> str:
    """Return the host name of a server inside the lab."""
    return f"server{server}"


def _name_servers(layout: Layout) -> None:
    """Write the lab's /etc/hosts. torch asks for every peer's name by its address as IPv6 has it, and warns without."""
    if HOSTS.exists():
        names = [(address_of(server), name_of(server)) for server in range(layout.servers)]
        lines = [f"{prefix}{address} {name}" for address, name in names for prefix in ("", "::ffff:")]
        namespaces.replace_file(HOSTS, "\n".join([HOSTS.read_text().rstrip("\n"), *lines, ""]))


def _hardware_address(server: int) -> str:
    return f"02:00:00:00:00:{server + 1:02x}"


def _connect(server: int, keeper: namespaces.Keeper, layout: Layout) -> None:
    """Make one server's link to the bridge."""
    port, inside = f"port{server}", _enter(keeper)
    new_link = f"link add {port} type veth peer name {INTERFACE} address {_hardware_address(server)}"
    _build(f"{new_link} netns {keeper.pid}", "the kernel needs its veth module", "ip")
    _build(f"link set {port} master br0 up", "", "ip")
    _build(f"fdb add {_hardware_address(server)} dev {port} master static", "", "bridge")
    _build("link set lo up", "", *inside, "ip")
    _build(f"address add {address_of(server)}/24 dev {INTERFACE}", "", *inside, "ip")
    _build(f"link set {INTERFACE} up", "", *inside, "ip")
    others = (other for other in range(layout.servers) if other != server)
    known = [f"{address_of(other)} lladdr {_hardware_address(other)} dev {INTERFACE} nud permanent" for other in others]
    _build("-batch -", "", *inside, "ip", lines=[f"neighbour add {neighbour}" for neighbour in known])
    if not layout.offloads:
        _build(f"-K {INTERFACE} tso off gso off gro off", "offloads=true leaves them as they are", *inside, "ethtool")
    if layout.bandwidth_bits_per_second is not None:
        for device, where in ((INTERFACE, inside), (port, [])):
            shape = f"qdisc add dev {device} root tbf {_bucket(layout.bandwidth_bits_per_second, layout.offloads)}"
            _build(shape, "the kernel needs its sch_tbf module, or leave bandwidth=null", *where, "tc")


def _bucket(rate: int, offloads: bool) -> str:
    """Return the parameters of tbf for a rate in bits per second."""
    burst_bytes = max(
        round(rate / 8 * BURST_SECONDS), LEAST_BURST_BYTES_WITH_OFFLOADS if offloads else LEAST_BURST_BYTES
    )
    queue_bytes = max(round(rate / 8 * QUEUE_SECONDS), LEAST_QUEUE_BYTES) + burst_bytes
    return f"rate {rate}bit burst {burst_bytes} limit {queue_bytes}"


def _build(arguments: str, remedy: str, *tool: str, lines: Sequence[str] = ()) -> None:
    """Run one step, with `lines` on standard input. Raises ConfigError with the tool's own words and the remedy."""
    done = subprocess.run([*tool, *arguments.split()], input="\n".join(lines), capture_output=True, text=True)
    if done.returncode != 0:
        said = " ".join(done.stderr.split())
        raise ConfigError(f"`{tool[-1]} {arguments}` failed: {said}{f' ({remedy})' if remedy else ''}.")


def _enter(keeper: namespaces.Keeper) -> list[str]:
    """Return the words before a command that is to run on a keeper's server. They end in exec: the pid stays."""
    return ["nsenter", f"--net=/proc/{keeper.pid}/ns/net", "--"]


def _read_counters(server: int, keeper: namespaces.Keeper) -> Counters:
    # /proc/net is that of the process whose directory it is read from; /sys/class/net is not.
    for line in Path(f"/proc/{keeper.pid}/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == INTERFACE:
            rx_bytes, rx_packets, *_, tx_bytes, tx_packets = map(int, numbers.split()[:10])
            return Counters(server, INTERFACE, address_of(server), tx_bytes, tx_packets, rx_bytes, rx_packets)
    raise AssertionError(f"no {INTERFACE} in server {server}")


def _extend_path() -> None:
    """Find the system's tools as root does, in this process and in those it starts."""
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join([*path, *(name for name in SYSTEM_DIRECTORIES if name not in path)])
