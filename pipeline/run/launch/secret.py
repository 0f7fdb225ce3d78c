"""The secret of a job: what only its ranks know, so that nobody else is taken for one of them.

Who starts all ranks (our launcher, the lab, slurm/*.sh) gives it to them in a variable. Ranks that nobody gave one,
started by hand, by torchrun or by a bare `srun`, find it in a file that rank 0 makes under `run_root` and that its
owner alone may read; it is removed once the ranks have met.
"""

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from pipeline.core.errors import ConfigError
from pipeline.run.launch.ranks import RankInfo

SECRET_VARIABLE = "SQUEEZEWIRE_SECRET"
LEAST_CHARACTERS = 16
MOST_BYTES = 1024
OWNER_ALONE = 0o600


def new_secret() -> str:
    """Return a secret that nobody guesses."""
    return secrets.token_hex(32)


def given_secret(environment: Mapping[str, str]) -> str | None:
    """Return the secret that this rank was given; None: none was.

    Args:
        environment: Variables of this process.

    Raises:
        ConfigError: It is too short to be one.
    """
    given = environment.get(SECRET_VARIABLE)
    if given is not None and len(given) < LEAST_CHARACTERS:
        raise ConfigError(
            f"{SECRET_VARIABLE} has {len(given)} characters, and {LEAST_CHARACTERS} are the least: set it, on every"
            " rank, to the same random text (`openssl rand -hex 32`), or unset it on all."
        )
    return given


class SecretFile:
    """The file in which ranks that were given no secret find one.

    Args:
        directory: `run_root`, on a file system of all ranks' machines.
        ranks: The place of this process; the file is named after the place where the ranks meet.
    """

    def __init__(self, directory: Path, ranks: RankInfo) -> None:
        place = hashlib.sha256(f"{ranks.master_addr} {ranks.master_port}".encode()).hexdigest()[:16]
        self.path = directory / f".meeting-{place}"
        self._made: list[Path] = []

    def make(self) -> str:
        """Make the file, by rank 0, and return what it holds.

        Raises:
            ConfigError: It cannot be made, or somebody else's lies there.
        """
        directory = self.path.parent
        self._made += [folder for folder in (directory, *directory.parents) if not folder.exists()]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)  # of a start that ended before its ranks had met
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, OWNER_ALONE)
            with os.fdopen(descriptor, "w") as file:
                file.write(secret := new_secret())
                file.flush()
                os.fsync(descriptor)
        except OSError as error:
            raise ConfigError(
                f"The ranks were given no secret, and {self.path}, to hold one, cannot be made"
                f" ({error.strerror}): set {SECRET_VARIABLE}, on every rank, to the same random text."
            ) from error
        return secret

    def read(self) -> str | None:
        """Return what the file holds; None: it is not there, or not yet.

        Raises:
            ConfigError: It may be somebody else's word.
        """
        try:
            list(self.path.parent.iterdir())  # network file systems remember for a while that a name was not there
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            is_sound = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
            text = file.read(MOST_BYTES).decode("ascii", "replace") if is_sound else ""
        if not is_sound:
            raise ConfigError(
                f"{self.path}, where the ranks find their secret, is not a file of yours that you alone may read:"
                f" remove it, or set {SECRET_VARIABLE}, on every rank, to the same random text."
            )
        return text if len(text) >= LEAST_CHARACTERS else None

    def remove(self) -> None:
        """Remove the file, and the folders that were made for it if they are empty."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
            for folder in self._made:
                folder.rmdir()
        self._made = []
