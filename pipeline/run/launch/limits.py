"""What one machine can be asked to start: processes, threads and pictures in memory, checked before anything starts.

The rule is generous, for ranks may share cores: four to a core, and in any case 16.
"""

import os

from pipeline.config.training import ClusterConfig
from pipeline.core.errors import ConfigError
from pipeline.core.units import format_bytes
from pipeline.run.launch.ranks import RankInfo
from pipeline.run.memory import available_memory

LEAST = 16
PER_CORE = 4
PROCESS_BYTES = 100_000_000
"""What a process that has imported torch holds for itself, at the least."""
FLOAT_BYTES, CHANNELS = 4, 3


def most_processes(*, in_memory: bool = False) -> int:
    """Return how many busy processes or threads this machine may be asked for.

    Args:
        in_memory: They are processes of their own, and must find room in the memory that is free; 16 always may.
    """
    most = max(LEAST, PER_CORE * (os.cpu_count() or 1))
    memory = available_memory("cpu") if in_memory else None
    return most if memory is None else min(most, max(LEAST, memory.num_bytes // PROCESS_BYTES))


def check_count(key: str, asked: int | None, *, of_each: int = 1, in_memory: bool = True) -> None:
    """Refuse more processes or threads than this machine can hold.

    Args:
        key: Key that asks for them.
        asked: How many; None: chosen by the program.
        of_each: How many processes each start so many.
        in_memory: As in `most_processes`.

    Raises:
        ConfigError: With the largest number that is taken.
    """
    most = max(1, most_processes(in_memory=in_memory) // of_each)
    if asked is not None and asked > most:
        each = f" in each of {of_each} processes" if of_each > 1 else ""
        raise ConfigError(
            f"{key}={asked}{each} is more than this machine takes ({os.cpu_count()} cores: {PER_CORE} processes or"
            f" threads to a core or {LEAST}, as far as memory goes): set {key} to {most} or less."
        )


def check_processes(cluster: ClusterConfig, num_workers: int | None, ranks: RankInfo | None) -> None:
    """Refuse ranks, threads and loader processes that this machine cannot hold.

    Args:
        cluster: Ranks and threads asked for.
        num_workers: Loader processes of each rank; None: chosen by the program.
        ranks: The place of this process; None where it is to start the ranks. Those of a launcher, which are there
            already, are no more a question, and those that we started were one before.

    Raises:
        ConfigError: With the largest number that is taken.
    """
    if ranks is not None and ranks.source == "spawned":
        return
    are_ours = ranks is None or ranks.source == "single"
    check_count("cluster.num_threads", cluster.num_threads, in_memory=False)
    if are_ours:
        check_count("cluster.devices", cluster.devices)
    check_count("data.num_workers", num_workers, of_each=cluster.devices if are_ours else 1, in_memory=are_ours)


def check_pictures(key: str, num_pictures: int, side: int, *, num_ranks: int) -> None:
    """Refuse batches of which the pictures alone do not fit into memory.

    Args:
        key: Key that says how many pictures a rank holds at once.
        num_pictures: How many.
        side: Largest side to which one is brought.
        num_ranks: Ranks of this machine.

    Raises:
        ConfigError: With the largest number of pictures that is taken, if there is one.
    """
    of_one = side * side * CHANNELS * FLOAT_BYTES * num_ranks
    memory = available_memory("cpu")
    most = 0 if memory is None else memory.num_bytes // of_one
    if memory is not None and num_pictures > most:
        remedy = f"set {key} to {most} or less, or make them smaller" if most else "lower data.size"
        raise ConfigError(
            f"{key}={num_pictures} pictures of {side} x {side} pixels take {format_bytes(num_pictures * of_one)} on"
            f" {num_ranks} rank(s), and {format_bytes(memory.num_bytes)} are available: {remedy}."
        )
