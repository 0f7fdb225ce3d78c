"""The conditions of a training in words, for the notes of its W&B run."""

from pipeline.config.hooks import COMPRESSIONS
from pipeline.config.training import BatchSplit, TrainConfig
from pipeline.core.units import format_bandwidth
from pipeline.run.launch.ranks import lab_conditions
from pipeline.training.world import World


def training_notes(config: TrainConfig, world: World, batch: BatchSplit) -> str:
    """Where it runs and what a step is, in two sentences. No path, host or command: they are nobody's business."""
    comm = config.comm
    hook = COMPRESSIONS[comm.hook].words + (f" of rank {comm.powersgd_rank}" if comm.hook == "powersgd" else "")
    return (
        f"{config.model.name} on {_counted(world.size, 'rank')}, {_servers(world)}, over {world.compute.backend}."
        f" A step is {batch.global_size} pictures ({_counted(batch.num_micro_batches, 'micro-batch', 'es')} of"
        f" {batch.per_rank} per rank), {world.compute.arithmetic}, gradients"
        f" {hook} (comm.hook={comm.hook})."
    )


def _servers(world: World) -> str:
    lab = lab_conditions()
    servers = _counted(world.placement.num_servers, "server")
    if lab is not None:
        rate = lab["bandwidth_bits_per_second"]
        link = "unshaped links" if rate is None else f"links of {format_bandwidth(rate)}"
        return f"{servers} emulated on one machine with {link}"
    return servers if world.placement.measured else "each rank taken as a server"


def _counted(count: int, noun: str, plural: str = "s") -> str:
    return f"{count} {noun}{'' if count == 1 else plural}"
