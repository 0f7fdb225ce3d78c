"""Asked by slurm/train.sh when the ranks have ended: does the job go back into the queue?

    python -m pipeline.requeue EXIT_CODE key=value ...

EXIT_CODE: of the ranks, as srun reports it; then what `train` was given. Exits 0 for yes, after it was written down.
For no: with the code of the rank that is the reason, or with EXIT_CODE.
"""

import functools
import os
import sys
from pathlib import Path

from pipeline.config.training import TrainConfig
from pipeline.core.cli import run_command
from pipeline.core.errors import ConfigError


def requeue(config: TrainConfig, exit_code: str) -> int:
    """Decide, write it down, say why."""
    from pipeline.core.exits import VARIABLE, read_causes
    from pipeline.run.launch.requeue import decide

    if not exit_code.isdigit():
        raise ConfigError(f"{exit_code!r} is no exit code: python -m pipeline.requeue EXIT_CODE key=value ...")
    job = os.environ.get("SLURM_JOB_ID", "none")
    directory = Path(config.run_root) / config.name
    causes = read_causes(os.environ.get(VARIABLE))
    decision = decide(
        directory,
        int(exit_code),
        job=job,
        limit=config.cluster.max_fruitless_requeues,
        rank_error=causes.error,
        num_lost=causes.num_lost,
    )
    print(decision.reason, flush=True)
    return 0 if decision.requeue else causes.error or int(exit_code) or 1


if __name__ == "__main__":
    first, *overrides = sys.argv[1:] or [""]
    if first.startswith("-"):
        nothing = functools.partial(requeue, exit_code="")
        run_command("train", TrainConfig, nothing, argv=sys.argv[1:], program="requeue", about=__doc__)
    run_command("train", TrainConfig, lambda config: requeue(config, first), argv=overrides)
