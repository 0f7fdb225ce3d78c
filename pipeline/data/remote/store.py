"""Places that shards are fetched from: a web server or an S3 bucket. One request at a time, no retries, no state.

Retries, resuming and hashes are transfer.py's; what is fetched is kept by cache.py.

Why these libraries (looked at in November 2026). urllib3 2.8 for HTTP: timeouts per read, reads that return what has
come, every header, no dependency; requests and W&B stand on it already. botocore 1.44 for S3: endpoints, regions and
all of AWS's sources of credentials (environment, ~/.aws, SSO, roles, instance metadata); a release a week. Not s3fs
2026.9, which is botocore under two more layers and an event loop, without Retry-After or resuming. Not obstore 0.12,
5 MB without a dependency: its retries do not know Retry-After (arrow-rs-object-store #410), its errors do not show
headers, and it reads no ~/.aws (obstore #571).
"""

from dataclasses import dataclass
from typing import Any, Protocol

SCHEMES = ("http", "https", "s3")
USER_AGENT = "squeezewire"
# 408 request timeout, 425 too early, 429 too many requests; of the 5xx those that say "not now".
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
MISSING_STATUS = frozenset({404, 410})
CHANGED_STATUS = frozenset({412, 416})  # the validator holds no more; the range is beyond the end


class FetchError(Exception):
    """A request did not succeed. The text is a clause without secrets, as in `HTTP 503`."""


class Transient(FetchError):
    """It may succeed later."""

    def __init__(self, reason: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_seconds = retry_after_seconds
        """What the server asks for; None: nothing."""


class Missing(FetchError):
    """There is no such object."""


class Refused(FetchError):
    """It will not succeed later either."""


class Changed(FetchError):
    """The object is another one than when its first bytes were fetched."""


@dataclass(frozen=True)
class Stat:
    """What a server says of an object."""

    num_bytes: int | None
    validator: str | None
    """Entity tag or time of change: another one means another content."""


class Body(Protocol):
    """An object on its way."""

    stat: Stat
    start: int
    """Offset of the first byte that `read` gives."""

    def read(self) -> bytes:
        """Some bytes, as they come; none at the end. Raises Transient."""
        ...

    def close(self) -> None:
        """Give the connection back, or drop it if there is more to come."""
        ...


class Store(Protocol):
    """Objects by name under one URL. Any thread of one process may use it."""

    url: str

    def head(self, name: str) -> Stat:
        """What the server says of an object. Raises FetchError."""
        ...

    def get(self, name: str, *, start: int = 0, validator: str | None = None) -> Body:
        """The object from byte `start` on, if `validator` still holds; else from the beginning, or Changed.

        Raises:
            FetchError: the server did not give it.
        """
        ...

    def names(self) -> list[str] | None:
        """All objects right under the URL, in order; None where the server cannot tell. Raises FetchError."""
        ...


@dataclass(frozen=True)
class Timeouts:
    """Time limits of a single request, in seconds."""

    connect: float
    read: float
    """Longest silence in seconds."""


def error_of_status(status: int, headers: Any, shown: str = "") -> FetchError:
    """The error that an HTTP status means; `headers` is a mapping."""
    shown = shown or f"HTTP {status}"
    if status in TRANSIENT_STATUS:
        return Transient(shown, retry_after(headers.get("Retry-After") or headers.get("retry-after")))
    if status in CHANGED_STATUS:
        return Changed(shown)
    return Missing(shown) if status in MISSING_STATUS else Refused(shown)


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date; None where it says nothing sensible."""
    import urllib3  # here, because local shards need none of it
    from urllib3.exceptions import InvalidHeader

    try:
        return urllib3.Retry(retry_after_max=2**31).parse_retry_after(value) if value else None
    except InvalidHeader:
        return None


def content_range(value: str, asked_start: int) -> tuple[int, int | None]:
    """(first byte, bytes of the whole) of `bytes 5-9/10`. Raises Transient if it is malformed or not asked for."""
    unit, _, rest = value.partition(" ")
    first, total = rest.partition("-")[0], rest.partition("/")[2]
    if unit != "bytes" or not first.isdigit():
        raise Transient("a range that cannot be understood")
    if int(first) != asked_start:
        raise Transient("a range that was not asked for")
    return asked_start, int(total) if total.isdigit() else None
