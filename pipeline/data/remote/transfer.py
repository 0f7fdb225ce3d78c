"""Objects brought here whole and proven, from servers that fail, stall, cut and lie; or an error that says why not.

A transfer resumes where it was cut. It is given up when nothing good has come of it for `FetchBudget.seconds`: waiting,
failing and trickling count, a mebibyte received at a bearable speed begins the time anew.
"""

import hashlib
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import SystemRandom
from typing import BinaryIO, TypeVar

from pipeline.core.errors import DataError
from pipeline.core.secrets import redacted
from pipeline.data.remote.store import Body, Changed, Missing, Refused, Stat, Store, Timeouts, Transient

T = TypeVar("T")

MIN_PROGRESS_BYTES = 2**20
"""An attempt that brings less is a failed one."""
LOW_BYTES_PER_SECOND = 10_000
MAX_WRONG_CONTENTS = 3
"""Times that an object may arrive whole and be the wrong one."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 30.0
SAY_AFTER_SECONDS = 5.0
PULSE_SECONDS = 0.2

_random = SystemRandom()  # servers and ranks must not come back in step, and no generator of the run is touched


@dataclass(frozen=True)
class FetchBudget:
    """How long a transfer may go without progress."""

    seconds: float
    """Seconds without any progress: data.fetch_timeout_seconds."""

    @property
    def timeouts(self) -> Timeouts:
        """Time limits of one request: short enough for several within `seconds`."""
        return Timeouts(connect=min(10.0, self.seconds / 4), read=self.low_speed_seconds)

    @property
    def low_speed_seconds(self) -> float:
        """Seconds over which the speed is measured."""
        return min(30.0, self.seconds / 4)


@dataclass(frozen=True)
class Expected:
    """What is known of an object before it is fetched; None: nothing."""

    num_bytes: int | None = None
    sha256: str | None = None
    validator: str | None = None
    """Stat.validator that it must still have."""
    most_bytes: int | None = None
    """If its size is not known: the largest that makes sense."""


Pulse = Callable[[], None]
"""Called several times a second while there is life; may raise to stop the transfer."""


def no_pulse() -> None:
    """For transfers that nobody watches."""


class Retries:
    """What is left of the budget for one object.

    Args:
        subject: the object and where it is, for messages.
    """

    def __init__(self, budget: FetchBudget, subject: str, pulse: Pulse) -> None:
        self.budget, self.subject, self.pulse = budget, subject, pulse
        self.reasons: Counter[str] = Counter()
        self._has_spoken = False
        self._pauses = 0
        self._since = time.monotonic()

    def progress(self) -> None:
        """Note that something good came: the budget begins anew."""
        self._since, self._pauses = time.monotonic(), 0

    def failed(self, error: Transient) -> None:
        """Wait, longer each time, as long as the server asks for where it does.

        Raises:
            DataError: The budget is spent, or would be after the pause.
        """
        self.reasons[str(error)] += 1
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**self._pauses)
        pause = (error.retry_after_seconds or 0.0) + pause * _random.uniform(0.5, 1.0)
        self._pauses += 1
        spent = time.monotonic() - self._since
        if spent + pause > self.budget.seconds:
            asked = error.retry_after_seconds
            raise DataError(
                f"{self.subject} could not be fetched in data.fetch_timeout_seconds={self.budget.seconds:g}:"
                f" {self.summary()}{f'; the server asks to wait {asked:g} s more' if asked else ''}."
                " Look after the server and the network and run the same command again, or allow more seconds."
            )
        if spent > SAY_AFTER_SECONDS and not self._has_spoken:
            self._has_spoken = True
            say(f"{self.subject}: {self.summary()}; it is tried for up to {self.budget.seconds:g} s")
        self._pause(pause)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.pulse()
            time.sleep(min(left, PULSE_SECONDS))

    def summary(self) -> str:
        """What went wrong how often: `HTTP 503 (twice), cut short`."""
        times = {1: "", 2: " (twice)"}
        return ", ".join(f"{reason}{times.get(n, f' ({n} times)')}" for reason, n in self.reasons.items())

    def report(self) -> None:
        """Name what went wrong before it went well: a limping server must not stay unknown."""
        if self.reasons:
            say(f"{self.subject} came after {sum(self.reasons.values())} failed attempts: {self.summary()}")


def say(text: str) -> None:
    """A warning on stderr."""
    print(f"warning: {redacted(text)}", file=sys.stderr, flush=True)


def head(
    store: Store, name: str, budget: FetchBudget, pulse: Pulse = no_pulse, *, is_optional: bool = False
) -> Stat | None:
    """What the server says of an object; None if there is none.

    Args:
        store: Where the object lies.
        name: Name of the object.
        budget: How long to try.
        pulse: Called while waiting.
        is_optional: A refusal counts as none too. Buckets that may not be listed refuse what is not there.

    Raises:
        DataError: the server refuses it, or does not answer in time.
    """
    retries = Retries(budget, f"{name} of {store.url}", pulse)
    try:
        return _persist(lambda: store.head(name), retries, is_optional=is_optional)
    except Missing:
        return None


def names(store: Store, budget: FetchBudget) -> list[str] | None:
    """All objects under the store's URL; None if the server cannot tell.

    Raises:
        DataError: the server refuses it, or does not answer in time.
    """
    try:
        return _persist(store.names, Retries(budget, f"The listing of {store.url}", no_pulse))
    except Missing as error:
        raise DataError(f"{store.url} does not exist ({error}): correct data.root.") from None


def _persist(request: Callable[[], T], retries: Retries, *, is_optional: bool = False) -> T:
    while True:
        try:
            answer = request()
        except Transient as error:
            retries.failed(error)
        except Refused as error:
            if is_optional:
                raise Missing(str(error)) from None
            raise _refusal(retries.subject, error) from None
        else:
            retries.report()
            return answer


def _refusal(subject: str, error: Exception) -> DataError:
    return DataError(
        f"{subject} is refused: {error}. Check data.root, and the credentials in the environment, ~/.aws or ~/.netrc."
    )


def fetch(
    store: Store,
    name: str,
    file: BinaryIO,
    *,
    expected: Expected = Expected(),
    budget: FetchBudget,
    pulse: Pulse = no_pulse,
) -> None:
    """Write the object `name` to `file`, from its beginning, and prove that it is what was expected.

    Args:
        store: Where the object lies.
        name: Name of the object.
        file: Open for writing, seekable, not buffered or flushed by the caller.
        expected: What the object must be.
        budget: How long to go without progress.
        pulse: Called while bytes come and while waiting.

    Raises:
        DataError: it is missing, refused, not the one expected, or did not come in time.
        OSError: `file` cannot be written.
    """
    transfer = _Transfer(store, name, file, expected, Retries(budget, f"{name} of {store.url}", pulse))
    while not transfer.is_whole:
        transfer.attempt()
    transfer.retries.report()


class _WrongContent(Exception):
    """The object arrived, or was about to, and is not the one expected."""


class _Transfer:
    """One object on its way through any number of attempts."""

    def __init__(self, store: Store, name: str, file: BinaryIO, expected: Expected, retries: Retries) -> None:
        self.store, self.name, self.file, self.expected, self.retries = store, name, file, expected, retries
        self.is_whole = False
        self._num_wrong = 0
        self._furthest = 0
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._position, self._digest = 0, hashlib.sha256()
        self._validator: str | None = None

    def attempt(self) -> None:
        """One request, and what it brings."""
        try:
            body = self.store.get(self.name, start=self._position, validator=self._validator)
            try:
                self._receive(body)
            finally:
                body.close()
            self._prove()
            self.is_whole = True
        except Transient as error:
            self._note_progress(error)
            if self._validator is None and self.expected.sha256 is None:
                self._begin_anew()  # nothing would tell the rest of this object from the rest of another
            self.retries.failed(error)
        except Changed:
            self._begin_anew()
            self.retries.failed(Transient("changed between two requests"))
        except _WrongContent as error:
            self._begin_anew()
            self._num_wrong += 1
            if self._num_wrong >= MAX_WRONG_CONTENTS:
                raise self._not_the_one(error) from None
            self.retries.failed(Transient(f"wrong content, {error}"))
        except Missing as error:
            raise DataError(
                f"{self.name} is missing at {self.store.url} ({error}): copy it there again, or correct data.root."
            ) from None
        except Refused as error:
            raise _refusal(self.retries.subject, error) from None

    def _note_progress(self, error: Transient) -> None:
        """Only what is new counts: a server without ranges may be cut at the same place for ever."""
        if self._position >= self._furthest + MIN_PROGRESS_BYTES and not isinstance(error, _TooSlow):
            self._furthest = self._position
            self.retries.progress()

    def _receive(self, body: Body) -> None:
        """Take the body into the file, as far as it comes."""
        total = self.expected.num_bytes if self.expected.num_bytes is not None else body.stat.num_bytes
        if body.start != self._position:  # the server knows no ranges, or the object has changed
            self._begin_anew()
        if body.stat.num_bytes is not None and body.stat.num_bytes != total:
            raise _WrongContent(f"{body.stat.num_bytes} bytes")
        if self.expected.validator is not None and body.stat.validator != self.expected.validator:
            raise DataError(
                f"{self.name} at {self.store.url} is no longer the one it was when the run began: shards must not"
                " change under a run. Start again from an empty name=, or put the old one back."
            )
        most = self.expected.most_bytes
        if most is not None and total is not None and total > most:
            raise self._too_large(most)
        self._validator = body.stat.validator
        self.file.seek(self._position)
        speed = _Speed(self.retries.budget.low_speed_seconds)
        while chunk := body.read():
            if total is not None and self._position + len(chunk) > total:
                raise _WrongContent("more bytes than expected")
            if most is not None and self._position + len(chunk) > most:
                raise self._too_large(most)
            self.file.write(chunk)
            self._digest.update(chunk)
            self._position += len(chunk)
            self.retries.pulse()
            speed.count(len(chunk))
        if total is not None and self._position < total:
            raise Transient("cut short")

    def _prove(self) -> None:
        if self.expected.sha256 not in (None, self._digest.hexdigest()):
            raise _WrongContent(f"SHA-256 {self._digest.hexdigest()[:16]}...")
        self.file.truncate(self._position)

    def _too_large(self, most: int) -> DataError:
        return DataError(
            f"{self.name} at {self.store.url} is larger than {most} bytes, which none of its kind is: copy the right"
            " one there, or correct data.root."
        )

    def _not_the_one(self, error: Exception) -> DataError:
        expected = self.expected
        wanted = f"{expected.num_bytes} bytes" + (f", SHA-256 {expected.sha256[:16]}..." if expected.sha256 else "")
        return DataError(
            f"{self.name} at {self.store.url} came {MAX_WRONG_CONTENTS} times with the wrong content ({error} instead"
            f" of {wanted}): it was damaged or changed there. Copy it there again, or prepare the shards again."
        )


class _TooSlow(Transient):
    """Bytes come, and too few."""


class _Speed:
    """Raises _TooSlow when the bytes of a whole window came too slowly."""

    def __init__(self, window_seconds: float) -> None:
        self.window_seconds = window_seconds
        self._began, self._num_bytes = time.monotonic(), 0

    def count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        elapsed = time.monotonic() - self._began
        if elapsed < self.window_seconds:
            return
        if self._num_bytes < LOW_BYTES_PER_SECOND * elapsed:
            raise _TooSlow(f"slower than {LOW_BYTES_PER_SECOND / 1000:g} kB/s")
        self._began, self._num_bytes = time.monotonic(), 0
