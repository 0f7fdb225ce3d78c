"""What a metered process is told: by `meter.attach`, or through one variable of the environment."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

VARIABLE = "SQUEEZEWIRE_METER"


@dataclass(frozen=True)
class Settings:
    """What is metered, and where it is written."""

    name: str
    """Name of the run."""
    run_root: str
    """Directory of all runs."""
    placement: str = "host"
    """`host`: servers are told apart by machine and boot; `rank`: each rank is taken as a server of its own."""
    command: tuple[str, ...] = ()
    """The command that is metered; empty: the program itself asked."""
    notes: str = ""
    """File to which each rank adds a line when it joins; empty: nobody reads one."""

    def encode(self) -> str:
        """Return the settings as text for the environment."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> "Settings":
        """Read what `encode` made."""
        value: dict[str, Any] = json.loads(text)
        return cls(**{**value, "command": tuple(value["command"])})

    @classmethod
    def given(cls, environment: Mapping[str, str] | None = None) -> "Settings | None":
        """Return what the environment tells; None where this process is not metered."""
        text = (os.environ if environment is None else environment).get(VARIABLE)
        return cls.decode(text) if text else None
