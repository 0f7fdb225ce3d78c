"""A web server as a store (remote.py), by urllib3."""

import http.client
import netrc
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import urllib3
import urllib3.exceptions as theirs

from pipeline.core.errors import DataError
from pipeline.core.secrets import redacted
from pipeline.data.remote.store import USER_AGENT, Refused, Stat, Timeouts, Transient, content_range, error_of_status

MAX_REDIRECTS = 5
REDIRECT_STATUS = frozenset({301, 302, 303, 307, 308})
READ_BYTES = 256 * 1024


class HttpStore:
    """A web server. Any will do; one that knows ranges lets a transfer that was cut go on where it was."""

    def __init__(self, url: str, timeouts: Timeouts) -> None:
        self.url = url.rstrip("/")
        self._timeout = urllib3.Timeout(connect=timeouts.connect, read=timeouts.read)
        self._pools: dict[str, urllib3.PoolManager] = {}

    def head(self, name: str) -> Stat:
        """See Store. Where HEAD is not allowed, GET is begun and dropped."""
        try:
            response = self._request("HEAD", name, {})
        except Refused as error:
            if "405" not in str(error) and "501" not in str(error):
                raise
            body = self.get(name)
            body.close()
            return body.stat
        response.release_conn()
        return _stat_of(response.headers, _length(response.headers))

    def get(self, name: str, *, start: int = 0, validator: str | None = None) -> "_HttpBody":
        """See Store."""
        headers = {}
        if start:
            headers["Range"] = f"bytes={start}-"
            if validator is not None and not validator.startswith("W/"):  # a weak tag does not vouch for bytes
                headers["If-Range"] = validator
        return _HttpBody(self._request("GET", name, headers), start)

    def names(self) -> None:
        """See Store: HTTP has no listing."""
        return

    def _request(self, method: str, name: str, headers: dict[str, str]) -> Any:
        """The response's head, redirects followed."""
        url = f"{self.url}/{quote(name)}"
        for _ in range(MAX_REDIRECTS + 1):
            with _transport_errors(urlsplit(url).scheme):
                response = self._pool(url).request(
                    method,
                    url,
                    headers={**self._base_headers(url), **headers},
                    timeout=self._timeout,
                    retries=False,
                    redirect=False,
                    preload_content=False,
                    decode_content=False,
                )
            if response.status in (200, 206):
                return response
            response.drain_conn() if method == "HEAD" else response.close()
            if response.status not in REDIRECT_STATUS or "Location" not in response.headers:
                raise error_of_status(response.status, response.headers)
            before, url = urlsplit(url).scheme, urljoin(url, response.headers["Location"])
            after = urlsplit(url).scheme
            if after not in ("http", "https"):
                raise Refused("a redirect to something that is not HTTP")
            if (before, after) == ("https", "http"):  # a login for this host would travel in clear
                raise Refused("a redirect from HTTPS to HTTP")
        raise Refused(f"more than {MAX_REDIRECTS} redirects")

    def _base_headers(self, url: str) -> dict[str, str]:
        """A login only for the host it is meant for: after a redirect it is looked up anew."""
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
        login = _login(urlsplit(url).hostname or "")
        return headers if login is None else {**headers, **_basic_auth(*login)}

    def _pool(self, url: str) -> Any:
        """Connections to the server, or to the proxy that the environment names for it."""
        parts = urlsplit(url)
        proxy = urllib.request.getproxies().get(parts.scheme)
        if proxy is None or urllib.request.proxy_bypass(parts.netloc):
            proxy = ""
        if proxy not in self._pools:
            self._pools[proxy] = _make_pool(proxy, f"{parts.scheme}_proxy")
        return self._pools[proxy]


class _HttpBody:
    """See Body."""

    def __init__(self, response: Any, asked_start: int) -> None:
        self._response = response
        length = _length(response.headers)
        self.start, total = 0, length
        if response.status == 206:
            self.start, total = content_range(response.headers.get("Content-Range", ""), asked_start)
        self.stat = _stat_of(response.headers, total)

    def read(self) -> bytes:
        with _transport_errors():
            return self._response.read1(READ_BYTES)

    def close(self) -> None:
        self._response.close()


def _make_pool(proxy: str, variable: str) -> Any:
    if not proxy:
        return urllib3.PoolManager(maxsize=32)
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")  # as curl takes it
    try:
        port = parts.port or 80
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or not port:
        raise Refused(f"{variable}={redacted(proxy)} is no proxy of the form http://HOST:PORT, and no_proxy names the"
                      " hosts that need none")  # fmt: skip
    login = f"{parts.username}:{parts.password or ''}" if parts.username else None
    headers = urllib3.make_headers(proxy_basic_auth=login) if login else None
    return urllib3.ProxyManager(
        f"{parts.scheme}://{parts.netloc.rpartition('@')[2].removesuffix(f':{port}')}:{port}",
        maxsize=32,
        proxy_headers=headers,
    )


@contextmanager
def _transport_errors(scheme: str = "http") -> Iterator[None]:
    """urllib3's errors in our words; its own repeat URLs and addresses of objects."""
    try:
        yield
    except theirs.SSLError as error:
        raise Refused(f"no TLS with the server ({redacted(str(error))})") from None
    except theirs.NameResolutionError:
        raise Transient("the host's name cannot be resolved") from None
    except theirs.NewConnectionError as error:
        raise Transient(f"no connection ({_last_clause(error)})") from None
    except theirs.ConnectTimeoutError:
        raise Transient("no connection in time") from None
    except theirs.ProxyError as error:
        reason = _last_clause(error.original_error)
        raise Transient(
            f"no way through the proxy that {scheme}_proxy names ({reason}); no_proxy names the hosts that need none"
        ) from None
    except theirs.ReadTimeoutError:
        raise Transient("silence in the middle") from None
    except theirs.ProtocolError as error:
        is_short = any(isinstance(cause, http.client.IncompleteRead) for cause in (error, *error.args))
        raise Transient("cut short" if is_short else "connection broken") from None
    except (theirs.LocationParseError, theirs.LocationValueError, theirs.InvalidHeader):
        raise Refused("an address or a header that cannot be understood") from None
    except (theirs.HTTPError, OSError):
        raise Transient("connection broken") from None


def _length(headers: Any) -> int | None:
    value = headers.get("Content-Length", "")
    return int(value) if value.isdigit() else None


def _stat_of(headers: Any, num_bytes: int | None) -> Stat:
    return Stat(num_bytes, headers.get("ETag") or headers.get("Last-Modified"))


def _last_clause(error: BaseException) -> str:
    """`Connection refused` of urllib3's long line."""
    return redacted(str(error).rpartition("] ")[2] or type(error).__name__)


def _login(host: str) -> tuple[str, str] | None:
    """User and password for a host from ~/.netrc (or the file that NETRC names), as curl and git read it."""
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        entry = netrc.netrc(path).hosts.get(host)  # no `default`: a redirect leads anywhere
    except FileNotFoundError:
        return None
    except (OSError, netrc.NetrcParseError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.msg
        raise DataError(f"{path} cannot be read ({reason}): mend it, or name another file in NETRC.") from None
    return None if entry is None else (entry[0], entry[2] or "")


def _basic_auth(user: str, password: str) -> dict[str, str]:
    return dict(urllib3.make_headers(basic_auth=f"{user}:{password}"))
