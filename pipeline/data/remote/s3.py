"""A bucket of S3, or of anything that speaks it, as a store (remote.py), by botocore."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import botocore.exceptions as theirs
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config

from pipeline.core.errors import DataError
from pipeline.core.secrets import redacted
from pipeline.data.remote.store import (
    USER_AGENT,
    FetchError,
    Refused,
    Stat,
    Timeouts,
    Transient,
    content_range,
    error_of_status,
    retry_after,
)

READ_BYTES = 16 * 1024  # botocore waits until so many have come, and a slow server must be noticed meanwhile
# Codes for "not now", whatever the status they come with.
TRANSIENT_CODES = frozenset({"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling"})


class S3Store:
    """A bucket of anything that speaks S3. Endpoint, region and credentials come from AWS's environment and files.

    Without any credentials requests are not signed, as public buckets want it.
    """

    def __init__(self, url: str, timeouts: Timeouts) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        self._bucket, prefix = parts.netloc, parts.path.strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._client = _make_s3_client(timeouts)

    def head(self, name: str) -> Stat:
        """See Store."""
        with _s3_errors():
            answer = self._client.head_object(Bucket=self._bucket, Key=self._prefix + name)
        return Stat(answer["ContentLength"], answer.get("ETag"))

    def get(self, name: str, *, start: int = 0, validator: str | None = None) -> "_S3Body":
        """See Store."""
        more = {"Range": f"bytes={start}-"} if start else {}
        if start and validator is not None:
            more["IfMatch"] = validator
        with _s3_errors():
            return _S3Body(self._client.get_object(Bucket=self._bucket, Key=self._prefix + name, **more), start)

    def names(self) -> list[str]:
        """See Store."""
        found: list[str] = []
        with _s3_errors():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix, Delimiter="/"
            )
            for page in pages:
                found += [entry["Key"].removeprefix(self._prefix) for entry in page.get("Contents", ())]
        return sorted(found)


class _S3Body:
    """See Body."""

    def __init__(self, answer: Any, asked_start: int) -> None:
        self._stream = answer["Body"]
        self.start, total = 0, answer["ContentLength"]
        if "ContentRange" in answer:
            self.start, total = content_range(answer["ContentRange"], asked_start)
        self.stat = Stat(total, answer.get("ETag"))

    def read(self) -> bytes:
        with _s3_errors():
            return self._stream.read(READ_BYTES)

    def close(self) -> None:
        self._stream.close()


def _make_s3_client(timeouts: Timeouts) -> Any:
    try:
        session = botocore.session.get_session()
        signing = {} if session.get_credentials() is not None else {"signature_version": UNSIGNED}
        config = Config(
            connect_timeout=timeouts.connect,
            read_timeout=timeouts.read,
            retries={"total_max_attempts": 1},
            max_pool_connections=32,
            response_checksum_validation="when_required",  # SHA-256 of the whole shard is checked anyway
            user_agent_extra=USER_AGENT,
            **signing,
        )
        return session.create_client("s3", config=config)
    except (theirs.BotoCoreError, ValueError) as error:
        raise DataError(
            f"S3 cannot be used ({redacted(str(error))}): mend the AWS variables or the files in ~/.aws."
        ) from None


@contextmanager
def _s3_errors() -> Iterator[None]:
    """Raise botocore's errors in our words."""
    try:
        yield
    except theirs.ClientError as error:
        raise _error_of_s3(error.response) from None
    except theirs.ConnectTimeoutError:
        raise Transient("no connection in time") from None
    except theirs.ReadTimeoutError:
        raise Transient("silence in the middle") from None
    except (theirs.IncompleteReadError, theirs.ResponseStreamingError):
        raise Transient("cut short") from None
    except theirs.EndpointConnectionError:
        raise Transient("no connection") from None
    except theirs.SSLError as error:
        raise Refused(f"no TLS with the server ({redacted(str(error))})") from None
    except theirs.HTTPClientError:
        raise Transient("connection broken") from None
    except theirs.BotoCoreError as error:  # credentials half given, a bucket's name that cannot be one, ...
        raise Refused(redacted(str(error))) from None


def _error_of_s3(response: Any) -> FetchError:
    code = str(response.get("Error", {}).get("Code", ""))
    metadata = response.get("ResponseMetadata", {})
    status = int(metadata.get("HTTPStatusCode") or 0)
    shown = f"HTTP {status}" if code in ("", str(status)) else f"HTTP {status} {code}"
    if code in TRANSIENT_CODES:
        return Transient(shown, retry_after(metadata.get("HTTPHeaders", {}).get("retry-after")))
    return error_of_status(status, metadata.get("HTTPHeaders", {}), shown)
