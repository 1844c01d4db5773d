"""Networks that are not to be relied on: one that loses every n-th answer, one that does anything to any."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections import Counter
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, parse_headers
from types import TracebackType
from typing import BinaryIO, Self
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


class UnrulyProxy:
    """Passes requests on and, by chance, loses, delays and doubles them, and loses or tears their answers.

    Chance is drawn from `seed` in the order in which requests come. `rate` of the requests meet something;
    `met` counts what.
    """

    FATES = ("dropped", "cut", "torn", "silent", "delayed", "doubled", "repeated_later")

    def __init__(self, base_url: str, seed: int, rate: float = 0.4) -> None:
        parts = urlsplit(base_url)
        self._server = (parts.hostname or "", parts.port or 80)
        self._chance, self._rate = random.Random(seed), rate
        self.met: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._open = [self._listener]
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
        self._over.set()
        with self._lock:
            for one in self._open:
                _hang_up(one)

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._open.append(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, HTTPException), client.makefile("rb") as requests:
            while (request := _request(requests)) is not None:
                answer = self._answer(request)
                if answer is None:
                    break
                client.sendall(answer)
                if answer.endswith(_TORN):
                    break
        _hang_up(client)

    def _answer(self, request: _Request) -> bytes | None:
        """What the client gets; None hangs up on it."""
        with self._lock:
            met = self._chance.random() < self._rate
            fate = self._chance.choice(self.FATES) if met else ""
            pause = self._chance.uniform(0.02, 0.3)
            self.met[fate] += 1
        if fate == "dropped":
            return None
        if fate == "delayed":
            self._over.wait(pause)
        elif fate == "doubled":
            self._pass_by_itself(request, 0.0)
        elif fate == "repeated_later":
            self._pass_by_itself(request, 10 * pause)
        answer = self._passed(request)
        if fate == "silent":
            self._over.wait(3 * pause)
        if fate in ("cut", "silent"):
            return None
        return answer[: len(answer) // 2] + _TORN if fate == "torn" else answer

    def _passed(self, request: _Request) -> bytes:
        connection = HTTPConnection(*self._server, timeout=60)
        try:
            connection.request(request.method, request.path, request.body, request.headers)
            found = connection.getresponse()
            body = found.read()
        finally:
            connection.close()
        left_out = ("connection", "transfer-encoding", "content-length")
        head = [f"HTTP/1.1 {found.status} {found.reason}", f"Content-Length: {len(body)}"]
        head += [f"{k}: {v}" for k, v in found.getheaders() if k.lower() not in left_out]
        return "\r\n".join([*head, "", ""]).encode("latin-1") + body

    def _pass_by_itself(self, request: _Request, after: float) -> None:
        """The same request once more, whose answer nobody gets."""

        def work() -> None:
            if not self._over.wait(after):
                with contextlib.suppress(OSError, HTTPException):
                    self._passed(request)

        threading.Thread(target=work, daemon=True).start()


# Ends an answer that is not whole; no JSON has it.
_TORN = b"\x00"


@dataclass(frozen=True)
class _Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def _request(stream: BinaryIO) -> _Request | None:
    """The next request of a connection, read whole; None at its end."""
    line = stream.readline().decode("latin-1").split()
    if len(line) != 3:
        return None
    headers = dict(parse_headers(stream).items())
    size = int(headers.get("Content-Length", headers.get("content-length", 0)))
    return _Request(line[0], line[1], headers, stream.read(size))
