"""What a command makes of its surroundings before it does anything: streams, home, temporary files, how is drawn.

Each of these has a state that some library answers with a traceback, in the middle of a run. What has one right answer
is put right here, for this process and all that it starts; the rest is refused.
"""

import os
import tempfile
from pathlib import Path

from pipeline.core.errors import ConfigError
from pipeline.core.streams import settle_streams

SOCKET_PATH_BYTES = 107  # <linux/un.h>, less the 0 at the end
LONGEST_FOLDER_BYTES = SOCKET_PATH_BYTES - len("/pymp-12345678/listener-12345678")
"""Of the folder for temporary files: with what multiprocessing adds to it, it is the path of a socket."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
NO_HOME = os.devnull
"""A home for users without one: nothing lies in it, and nothing can be made in it, by root neither."""


def settle_surroundings() -> list[str]:
    """Put right what has one right answer, in this process and in its environment.

    Returns:
        A sentence for each thing that is other than the user asked for.

    Raises:
        ConfigError: There is no folder for temporary files.
    """
    settle_streams()
    if "MPLBACKEND" in os.environ:  # that of a notebook, say, which is not installed here; figures go to files anyway
        os.environ["MPLBACKEND"] = "agg"
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)  # empty, it would be believed
        try:
            os.environ["HOME"] = str(Path.home())  # of /etc/passwd
        except RuntimeError:
            os.environ["HOME"] = NO_HOME
    return settle_temporary_folder()


def settle_temporary_folder() -> list[str]:
    """Make TMPDIR a folder in which files can be made and sockets bound, whatever it was.

    Returns:
        A sentence, if TMPDIR was another one.

    Raises:
        ConfigError: There is none.
    """
    asked = os.environ.get("TMPDIR")
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ConfigError("No folder for temporary files can be written to: set TMPDIR to one that can.") from error
    reason = "cannot be written to"
    if len(os.fsencode(folder)) > LONGEST_FOLDER_BYTES:
        reason = f"is longer than {LONGEST_FOLDER_BYTES} bytes, too long for the paths of sockets in it"
        places = [place for place in SHORT_FOLDERS if os.access(place, os.W_OK | os.X_OK)]
        if not places:
            raise ConfigError(
                f"The folder for temporary files, {folder}, {reason}, and none of {', '.join(SHORT_FOLDERS)} can be"
                " written to: set TMPDIR to a folder with a shorter path."
            )
        folder = places[0]
    tempfile.tempdir = folder
    if asked is not None:
        os.environ["TMPDIR"] = folder
    if not asked or Path(asked).absolute() == Path(folder):
        return []
    return [f"TMPDIR={asked} {reason}: temporary files lie in {folder}."]
