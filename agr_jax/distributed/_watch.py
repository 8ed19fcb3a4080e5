"""Notices at once that another process has ended, wherever this one waits.

JAX's collectives do not end when a process stops to take part, and its own watch kills the others
by SIGABRT, after its heartbeat's timeout. So each process holds a connection to the first one,
which its system closes however it ends; the first one tells the others why.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from agr_jax.distributed._agreement import broadcast
from agr_jax.distributed._processes import Processes

LOST_PROCESS = 75
"""Exit status of a process that ends because another one has ended: try again (`EX_TEMPFAIL`)."""

_SECONDS_TO_CONNECT = 10.0
# A process that has reached the end waits for the others' word at most so long.
_SECONDS_TO_SAY = 2.0


class Watch:
    """The connections of this process. Made by all processes at once.

    Args:
        processes: this one among all.
        host: address on which the first process listens, and nothing else does.
    """

    def __init__(self, processes: Processes, host: str) -> None:
        self._processes = processes
        self._lock = threading.Lock()
        self._peers: dict[int, socket.socket] = {}
        self._over = False
        listener, told = None, {}
        if processes.index == 0:
            listener = socket.create_server((host, 0), family=_family(host))
            told = {"port": listener.getsockname()[1], "token": secrets.token_hex(16)}
        told = json.loads(broadcast(json.dumps(told).encode()))
        if listener is not None:
            self._accept(listener, told["token"])
        else:
            peer = socket.create_connection((host, told["port"]), timeout=_SECONDS_TO_CONNECT)
            _send(peer, {"token": told["token"], "process": processes.index})
            self._peers[0] = peer
        for index, peer in self._peers.items():
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            threading.Thread(
                target=self._listen, args=(index, peer), name="watch", daemon=True
            ).start()

    def _accept(self, listener: socket.socket, token: str) -> None:
        """Connections from all others; whoever does not know the token is turned away."""
        until = time.monotonic() + _SECONDS_TO_CONNECT
        with listener:
            while len(self._peers) < self._processes.count - 1:
                listener.settimeout(max(until - time.monotonic(), 0.01))
                peer, _ = listener.accept()
                peer.settimeout(_SECONDS_TO_CONNECT)
                said = _receive(peer.makefile("rb"))
                index = said.get("process")
                if secrets.compare_digest(str(said.get("token")), token) and index is not None:
                    self._peers[int(index)] = peer
                else:
                    peer.close()

    def _listen(self, index: int, peer: socket.socket) -> None:
        """Waits for what a peer says, or for its end."""
        said: dict[str, Any] = {}
        with contextlib.suppress(OSError), peer.makefile("rb") as stream:  # also if it is reset
            said = _receive(stream)
        if self._over or said.get("done"):
            return
        reason = said.get("reason") or f"Process {index} has ended without a word."
        # From this thread: the main one may never return from a collective.
        self.leave(
            f"process {self._processes.index} stops too; what was saved stays, and the same "
            f"command continues. {reason}",
            LOST_PROCESS,
            reason,
        )

    def leave(self, message: str, status: int, reason: str) -> NoReturn:
        """Ends this process with a line, and the others for a reason."""
        with self._lock:  # there is one line: the first one's
            self._tell({"reason": reason})
            end_now(message, status)

    def _tell(self, message: dict[str, Any]) -> None:
        """Says something to all that this process is connected to."""
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.settimeout(_SECONDS_TO_SAY)
                _send(peer, message)

    def done(self) -> None:
        """From here on, others may end."""
        self._over = True
        self._tell({"done": True})


def end_now(message: str, status: int) -> NoReturn:
    """Prints one line and ends, without JAX's barrier at the exit, which waits for the others."""
    # One write: another process's line may not fall in between.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        os.write(sys.stderr.fileno(), f"error: {message}\n".encode())
    os._exit(status)


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]


def _send(peer: socket.socket, message: dict[str, Any]) -> None:
    peer.sendall(json.dumps(message).encode() + b"\n")


def _receive(stream: Any) -> dict[str, Any]:
    """One message; an empty one where the connection ended instead."""
    line = stream.readline(1 << 16)
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}
