"""The ledger of any program that uses torch.distributed: what its ranks owe, carry and send, without a change to it.

    python -m pipeline.meter name=mine -- torchrun --nproc-per-node=2 train.py --lr 0.1

What follows `--` is run as it stands, under any launcher; `python` is this interpreter. Its exit code is this
command's. Left in `<run_root>/<name>/`: ledger.json, metrics.jsonl, report.html. In a program of one's own:

    from pipeline import meter
    with meter.attach("mine") as ledger: ...
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.meter import MeterConfig
from pipeline.core.cli import run_command, split_arguments
from pipeline.core.errors import ConfigError
from pipeline.core.typed import require
from pipeline.metering.door import Metered, attach, run_metered
from pipeline.metering.settings import Settings

__all__ = ["Metered", "attach", "meter"]


def meter(config: MeterConfig, command: Sequence[str]) -> int:
    """Run `command` under the meter and report what it exchanged. Returns its exit code."""
    from pipeline.metering.outcome import conclude, ledger_stamp
    from pipeline.metering.record import require_writable
    from pipeline.run.directory import validate_name

    require(bool(command), "No command: give it after `--`, as in `-- torchrun --nproc-per-node=2 train.py`.")
    validate_name(config.name)
    program = sys.executable if command[0] == "python" else shutil.which(command[0])
    if program is None:
        raise ConfigError(f"{command[0]} is not a program: what follows `--` is run as a shell would run it.")
    run_root = str(Path(config.run_root).absolute())
    settings = Settings(config.name, run_root, config.placement, command=tuple(command))
    require_writable(settings)
    stamp = ledger_stamp(settings)
    code, joined = run_metered(settings, [program, *command[1:]])
    conclude(settings, code, joined, stamp=stamp)
    return code


if __name__ == "__main__":
    own_arguments, metered_command = split_arguments(sys.argv[1:])
    run_command("meter", MeterConfig, lambda config: meter(config, metered_command), argv=own_arguments)
