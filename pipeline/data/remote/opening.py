"""Which kind of place a URL is, and the store that reads it."""

from pathlib import Path
from urllib.parse import urlsplit

from pipeline.core.errors import DataError
from pipeline.core.secrets import redacted
from pipeline.data.remote.store import SCHEMES, Store, Timeouts


def is_url(root: str | Path) -> bool:
    """Whether `root` is a URL rather than a directory."""
    return "://" in str(root)


def open_store(url: str, timeouts: Timeouts) -> Store:
    """The store behind a URL; nothing is sent yet.

    Raises:
        DataError: the URL is of no scheme that is known, or names no host or bucket.
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES or not parts.netloc:
        raise DataError(f"data.root={redacted(url)} must be a directory, http(s)://host/path or s3://bucket/prefix.")
    if parts.path.endswith(".tar"):
        raise DataError(
            f"data.root={redacted(url)} is a tar: give what stands before its name as data.root, and the name, with"
            " braces if there are several, as the split."
        )
    if parts.scheme == "s3":
        from pipeline.data.remote.s3 import S3Store  # here, because botocore is large and few shards lie in buckets

        return S3Store(url, timeouts)
    from pipeline.data.remote.http import HttpStore  # here, because local shards need none of it

    return HttpStore(url, timeouts)
