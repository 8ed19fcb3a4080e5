"""Downloads that go on where they stopped, are tried again, and are checked before they count."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import time
import urllib.parse
from pathlib import Path
from typing import Any

from agr_jax.errors import DataError
from agr_jax.progress import Progress

_BLOCK_BYTES = 2**16  # of a block that breaks off nothing is kept
_SECONDS_BEFORE_AGAIN = (1.0, 3.0, 10.0)
_TIMEOUT_SECONDS = 30.0


class DownloadError(DataError):
    """A download that failed; its message says why."""


def download(
    address: str,
    path: Path,
    *,
    size: int,
    checksum: str,
    waits: tuple[float, ...] = _SECONDS_BEFORE_AGAIN,
) -> Path:
    """Downloads a file, or finds it whole already.

    What arrived stays in `<path>.partial` and is continued by the next try or the next call. The
    file gets its name only after its size and checksum were found right. Of two processes at once
    one downloads and the other waits for it.

    Args:
        address: an `http` or `https` address.
        path: where to put the file; its folder is made.
        size: in bytes.
        checksum: `sha256:...` or `md5:...`.
        waits: seconds before each further try.

    Returns:
        `path`.

    Raises:
        DownloadError: no connection, an answer that is no file, or another file than expected.
    """
    if path.is_file():
        return path
    try:
        import requests
    except ImportError as error:
        raise DownloadError("downloading needs requests: pip install requests") from error
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock").open("w")
    except OSError as error:
        raise DownloadError(f"{path.parent}: cannot be written: {error}") from error
    tries = len(waits) + 1
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():  # another process was faster
            return path
        for number in range(1, tries + 1):
            try:
                _fetch(requests, address, partial, size)
                _verify(partial, address, size, checksum)
                partial.replace(path)
                return path
            except (requests.RequestException, DownloadError, OSError) as error:
                reason = _reason(error)
                if isinstance(error, _FinalError):
                    raise DownloadError(f"{address}: {reason}") from error
                if number == tries:
                    raise DownloadError(f"{address}: {reason} (try {number} of {tries})") from error
                print(f"{address}: {reason}; trying again in {waits[number - 1]:g} s", flush=True)
                time.sleep(waits[number - 1])
    raise AssertionError("unreachable")


class _FinalError(DownloadError):
    """Trying again would not help."""


def _fetch(requests: Any, address: str, partial: Path, size: int) -> None:
    have = partial.stat().st_size if partial.is_file() else 0
    if have == size:
        return
    if have > size:
        partial.unlink()
        have = 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    _check_name_is_known(requests, address)
    with requests.get(address, headers=headers, stream=True, timeout=_TIMEOUT_SECONDS) as answer:
        if 400 <= answer.status_code < 500 and answer.status_code not in (408, 429):
            raise _FinalError(f"the server answers {answer.status_code} {answer.reason}")
        answer.raise_for_status()
        continues = answer.status_code == 206
        have = have if continues else 0
        with (
            partial.open("ab" if continues else "wb") as file,
            Progress(
                f"downloading {partial.stem}", size >> 20, initial=have >> 20, unit="MB"
            ) as progress,
        ):
            shown = have >> 20
            for block in answer.iter_content(_BLOCK_BYTES):
                have += len(block)
                if have > size:
                    file.truncate(0)
                    raise _FinalError(f"expected {size:,} bytes, found more")
                file.write(block)
                progress.advance((have >> 20) - shown)
                shown = have >> 20
            file.flush()
            os.fsync(file.fileno())  # before it gets its name
    if have < size:
        raise DownloadError(f"the connection ended after {have:,} of {size:,} bytes")


def _check_name_is_known(requests: Any, address: str) -> None:
    """Without a network names are not found: waiting would not help."""
    host = urllib.parse.urlsplit(address).hostname
    if requests.utils.get_environ_proxies(address):
        return  # which knows the names
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise _FinalError(f"no network, or none that knows {host}: {error}") from error


def _verify(partial: Path, address: str, size: int, checksum: str) -> None:
    algorithm, _, expected = checksum.partition(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with partial.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() != expected:
        partial.unlink()
        raise DownloadError(
            f"not the official file: expected {algorithm} {expected}, found {digest.hexdigest()} "
            f"in {size:,} bytes"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, DownloadError):
        return str(error)
    text = str(error).splitlines()
    return f"{type(error).__name__}{': ' + text[0] if text else ''}"
