"""Byte ranges over http and https.

Not by fsspec: its HTTP file system runs in an event loop on a thread that a fork leaves behind, limits the time of a
whole request and not that of a silence, and does not compare an answer with what was asked. The standard library's
client is synchronous, keeps its connections, and shows status, `Content-Range` and each block as it comes.
"""

import re
import time
from base64 import b64encode
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from threading import local
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from datamodules.webdataset.per_process import PerProcess
from datamodules.webdataset.retry import BusyError, PermanentError

BLOCK = 1 << 20
MAX_REDIRECTS = 5
# Client errors that pass: timeout, too early, too many requests.
PASSING = (408, 425, 429)
_UNQUOTED = "%/?:@!$&'()*+,;=~[]"

# An answer, its connection, and the host under which the connection is kept.
Answer = tuple[HTTPResponse, HTTPConnection, str]


class HttpClient:
    """Reads ranges of files whose size is known, and refuses every answer that does not fit.

    A connection is kept for each thread and host. Proxies come from the environment (`https_proxy`, `no_proxy`).

    Args:
        timeout: Seconds in which a connection, an answer's head, or a block of a megabyte must come.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._connections = PerProcess(local)

    def stream(self, url: str, start: int, stop: int, size: int) -> Iterator[bytes]:
        """Yield bytes `start` to `stop` of a file of `size` bytes, in blocks, all of them or an error.

        Raises:
            PermanentError: The file has another size, is not there, or is not served in ranges.
            OSError: The connection broke, stood still, or brought too little.
            http.client.HTTPException: The answer is none.
        """
        response, connection, place = self._answer(url, start, stop)
        complete = False
        try:
            skip = _check(response, start, stop, size)
            missing = stop - start
            while missing:
                block = self._block(response, skip + missing)
                missing -= max(0, len(block) - skip)
                if len(block) > skip:
                    yield block[skip:]
                skip = max(0, skip - len(block))
            if response.read1(1):
                raise ConnectionError(f"the answer goes on after {stop - start} bytes")
            complete = not response.will_close
        finally:
            response.close()
            # What comes next on a connection is the next answer only if the last one was read to its end.
            if complete:
                self._connections.get().__dict__[place] = connection
            else:
                connection.close()

    def _block(self, response: HTTPResponse, most: int) -> bytes:
        """Return up to a megabyte, less only at the end that was asked for."""
        most = min(BLOCK, most)
        deadline = time.monotonic() + self._timeout
        parts: list[bytes] = []
        got = 0
        while got < most:
            part = response.read1(most - got)
            if not part:
                raise ConnectionError(f"the answer ended {most - got} bytes or more too early")
            parts.append(part)
            got += len(part)
            if got < most and time.monotonic() > deadline:
                raise TimeoutError(f"{got} of {most} bytes came in {self._timeout} s")
        return b"".join(parts)

    def _answer(self, url: str, start: int, stop: int) -> Answer:
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        for _ in range(MAX_REDIRECTS + 1):
            response, connection, place = self._request(url, headers)
            location = response.getheader("Location")
            if response.status not in (301, 302, 303, 307, 308) or location is None:
                return response, connection, place
            connection.close()
            url = urljoin(url, location)
        raise PermanentError(f"more than {MAX_REDIRECTS} redirects")

    def _request(self, url: str, headers: dict[str, str]) -> Answer:
        parts = urlsplit(url)
        connections = self._connections.get().__dict__
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PermanentError("it redirects to what is no http(s) URL")
        place = f"{parts.scheme}://{parts.netloc}"
        # What is no character of a URL is quoted, as other clients do.
        target = quote(parts._replace(scheme="", netloc="", fragment="").geturl(), safe=_UNQUOTED) or "/"
        host = parts.netloc.rpartition("@")[2]
        if parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers = {**headers, "Authorization": f"Basic {b64encode(user.encode()).decode()}"}
        proxy = _proxy(parts.scheme, host)
        if proxy is not None and parts.scheme == "http":
            # Without user and password, which are in the header.
            target = f"http://{host}{target}"
        while True:
            connection: HTTPConnection | None = connections.pop(place, None)
            kept = connection is not None
            connection = connection or _connect(parts, proxy, self._timeout)
            try:
                connection.request("GET", target, headers=headers)
                response = connection.getresponse()
            except (OSError, HTTPException) as error:
                connection.close()
                # A server may close a connection that was idle: that says nothing about the next one.
                if kept and not isinstance(error, TimeoutError):
                    continue
                raise
            return response, connection, place


def _connect(parts: SplitResult, proxy: SplitResult | None, timeout: float) -> HTTPConnection:
    via = proxy or parts
    assert via.hostname is not None
    make = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = make(via.hostname, via.port, timeout=timeout)
    if proxy is not None and parts.scheme == "https":
        connection.set_tunnel(parts.netloc.rpartition("@")[2])
    return connection


def _proxy(scheme: str, host: str) -> SplitResult | None:
    proxy = getproxies().get(scheme)
    if proxy is None or proxy_bypass(host):
        return None
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}")


def _check(response: HTTPResponse, start: int, stop: int, size: int) -> int:
    """Return how many bytes come before those that were asked for.

    Raises:
        OSError: The answer is another one; `PermanentError` if it would be so again.
    """
    status, length = response.status, response.length
    if status == 200:
        if length is not None and length != size:
            raise PermanentError(f"it has {length} bytes, the index says {size}; the shard was changed")
        # A whole shard is worth reading again up to the place, a sample is not.
        if stop < size:
            raise PermanentError("the server does not serve ranges; use a cache with fill='first'")
        return start
    if status == 206:
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", (response.getheader("Content-Range") or "").strip())
        if found is None or (int(found[1]), int(found[2]) + 1) != (start, stop):
            text = response.getheader("Content-Range")
            raise ConnectionError(f"the answer is for the range {text!r}, expected bytes {start}-{stop - 1}")
        if found[3] not in ("*", str(size)):
            raise PermanentError(f"it has {found[3]} bytes, the index says {size}; the shard was changed")
        if length is not None and length != stop - start:
            raise ConnectionError(f"the answer has {length} bytes, expected {stop - start}")
        return 0
    if status == 416:
        raise PermanentError(f"it has no bytes {start}-{stop - 1}, the index says {size} bytes; the shard was changed")
    message = f"status {status} {response.reason}"
    if status < 500 and status not in PASSING:
        raise PermanentError(message)
    wait = response.getheader("Retry-After") or ""
    raise BusyError(message, float(wait) if wait.isdecimal() else 0.0)
