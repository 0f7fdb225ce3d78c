"""W&B's variables and our keys: what contradicts is refused before a run, what is not obeyed is said."""

import contextlib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.config.training import TrackingConfig
from pipeline.core.errors import ConfigError
from pipeline.core.typed import nearest, require

MODES = {"disabled": "disabled", "offline": "offline", "dryrun": "offline", "online": "online", "run": "online"}
"""Values of WANDB_MODE, as our modes; the later ones send more."""
_SENDS_MORE = ("disabled", "offline", "online")
_SERVICE = re.compile(r"\d+-(?P<pid>\d+)-(?:unix-(?P<socket>.+)|tcp-localhost-\d+)")


def sweep_run_id(environment: Mapping[str, str]) -> str | None:
    """Return the id that the agent of a W&B sweep gives this run, which W&B takes whatever it is told; None without."""
    return environment.get("WANDB_RUN_ID") if environment.get("WANDB_SWEEP_ID") else None


def check_variables(tracking: TrackingConfig, id_file: Path, environment: Mapping[str, str]) -> None:
    """Refuse variables with which W&B would fail, or write into another run.

    Args:
        tracking: Where the mirror is to go.
        id_file: Where the run keeps its W&B id.
        environment: Variables.

    Raises:
        ConfigError: With the variable to change.
    """
    asked = environment.get("WANDB_MODE", "offline")
    require(asked in MODES, f"WANDB_MODE={asked} is not one of {', '.join(MODES)}.{nearest(asked, MODES)}")
    if _mode(tracking, environment) == "disabled":
        return
    service = _SERVICE.fullmatch(environment.get("WANDB_SERVICE", ""))
    if service is not None and _is_gone(int(service["pid"]), service["socket"]):
        raise ConfigError(
            f"WANDB_SERVICE={service[0]} is of a process that is gone: unset WANDB_SERVICE, or set tracking=disabled."
        )
    url = environment.get("WANDB_BASE_URL")
    require(
        not url or re.match(r"https?://[^/]", url) is not None,
        f"WANDB_BASE_URL={url} is no address of a W&B server: write https://HOST, or unset it.",
    )
    given, kept = sweep_run_id(environment), None
    with contextlib.suppress(OSError):
        kept = id_file.read_text().strip()
    require(
        not given or not kept or given == kept,
        f"The W&B sweep gives this run the id {given}, but {id_file.parent} is W&B's run {kept}: choose another name=,"
        " one for each run of the sweep.",
    )


def mode_here(tracking: TrackingConfig, environment: Mapping[str, str]) -> str:
    """Return the mode of the mirror, of which the environment may make less; what of it is not obeyed is said."""
    mode = _mode(tracking, environment)
    asked = MODES.get(environment.get("WANDB_MODE", tracking.mode), tracking.mode)
    if mode != tracking.mode:
        why = "as the environment asks (WANDB_MODE, WANDB_DISABLED)"
        print(f"W&B is {mode}, {why}: tracking.mode={tracking.mode} is not obeyed.", flush=True)
    elif asked != mode:
        print(f"WANDB_MODE={environment['WANDB_MODE']} is not obeyed: tracking.mode={mode} is.", flush=True)
    ours = {"WANDB_PROJECT": tracking.project, "WANDB_ENTITY": tracking.entity}
    ignored = [name for name, value in ours.items() if value and environment.get(name, value) != value]
    ignored += [name for name in ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_DIR", "WANDB_TAGS") if environment.get(name)]
    if ignored and mode != "disabled" and sweep_run_id(environment) is None:
        print(f"{', '.join(ignored)}: not obeyed; name=, run_root= and tracking.* say it.", file=sys.stderr, flush=True)
    return mode


def _mode(tracking: TrackingConfig, environment: Mapping[str, str]) -> str:
    is_off = environment.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes")
    asked = "disabled" if is_off else MODES.get(environment.get("WANDB_MODE", tracking.mode), tracking.mode)
    return min(asked, tracking.mode, key=_SENDS_MORE.index)


def _is_gone(pid: int, socket: str | None) -> bool:
    if socket is not None and not Path(socket).exists():
        return True
    try:
        os.kill(pid, 0)
    except OverflowError:
        return True
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False
