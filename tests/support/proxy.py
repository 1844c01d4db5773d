"""A network that loses answers: a TCP proxy that cuts connections once the request has gone through."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


class CuttingProxy:
    """Passes requests on to a server; every `every`-th answer is thrown away with its connection."""

    def __init__(self, base_url: str, every: int) -> None:
        parts = urlsplit(base_url)
        self._server = (parts.hostname or "", parts.port or 80)
        self._every, self._answers, self.cut = every, 0, 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._listener]
        self.base_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            for one in self._open:
                _hang_up(one)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            with self._lock:
                self._open += [client, server]
            threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        try:
            while data := source.recv(65536):
                if answers and data.startswith(b"HTTP/1.1 ") and self._cuts():
                    break
                target.sendall(data)
        except OSError:
            pass
        _hang_up(source)
        _hang_up(target)

    def _cuts(self) -> bool:
        with self._lock:
            self._answers += 1
            due = self._answers % self._every == 0
            self.cut += due
            return due


def _hang_up(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
