"""`pipeline.train` up to the open shards; every rank tells in `<OPENED_TO>/rank<r>.json` which tars it has opened."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from pipeline.config.training import TrainConfig
from pipeline.core.cli import run_command
from pipeline.run.launch.ranks import find_ranks
from pipeline.run.launch.supervisor import supervise


def open_recorded(config: TrainConfig) -> int:
    """Join, open, tell, leave."""
    if "RANK" not in os.environ:
        return supervise([sys.executable, *sys.argv], config.cluster.devices, num_threads=config.cluster.num_threads)
    from pipeline.training import steps

    opened: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(".tar"):
            opened.append(Path(arguments[0]).name)

    sys.addaudithook(note)
    ranks = find_ranks(config.cluster.devices)
    assert ranks is not None
    with steps.join(config, ranks) as world:
        shards = steps.open_shards(config, world)
        told = {"opened": sorted(opened), "num_samples": shards.training.num_samples}
    (Path(os.environ["OPENED_TO"]) / f"rank{ranks.rank}.json").write_text(json.dumps(told))
    return 0


if __name__ == "__main__":
    run_command("train", TrainConfig, open_recorded)
