"""Would this training run here? What usually goes wrong, checked in a minute before a night is lost.

    sbatch slurm/preflight.sh name=first data.root=shards/imagenet ...     # what slurm/train.sh would be given
    python -m pipeline.ready name=first data.root=shards/builtin cluster.devices=2 trainer.max_epochs=1

Nothing is trained, and nothing is left behind. Exits with the code that the training would end with.
"""

from typing import TYPE_CHECKING

from pipeline.config.training import TrainConfig
from pipeline.core.cli import run_command
from pipeline.core.errors import UserError

if TYPE_CHECKING:
    from pipeline.run.launch.ranks import RankInfo


def ready(config: TrainConfig) -> int:
    """Check, print a table, return the exit code of the first thing that is wrong, or 0."""
    from pipeline.run.launch.supervisor import as_ranks

    num_workers = config.data.num_workers
    return as_ranks("ready", config.cluster, lambda ranks: ready_as(ranks, config), num_workers=num_workers)


def ready_as(ranks: "RankInfo", config: TrainConfig) -> int:
    """Check as one of the ranks."""
    from pipeline.training.readiness import Findings, check_alone, check_together, join_soon

    findings = Findings()
    if ranks.is_first:
        check_alone(config, findings)
    try:
        with join_soon(config, ranks) as world:
            check_together(config, world, findings)
            code = world.first_decides(findings.exit_code)
            world.say(findings.table())
    except UserError as error:
        if not ranks.is_first:
            raise
        findings.wrong("ranks", error)
        print(findings.table(), flush=True)  # what is known already is not lost with the ranks that did not come
        code = findings.exit_code()
    return code


if __name__ == "__main__":
    run_command("train", TrainConfig, ready, program="ready", about=__doc__)
