"""A command in a terminal of its own, as a person at a keyboard has it."""

from __future__ import annotations

import os
import pty
import select
import struct
import termios
import time
from collections.abc import Mapping, Sequence
from fcntl import ioctl
from pathlib import Path
from types import TracebackType
from typing import Self

TIMEOUT_S = 60.0
CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"


class Terminal:
    """Types at a command and reads what it shows; as a context manager it ends the command."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], cwd: Path, columns: int = 100
    ) -> None:
        """Starts the command in a terminal that is so many columns wide."""
        self.shown = ""
        self._read = 0
        self._status: int | None = None
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            # The child: nothing of the tests may run here.
            try:
                os.chdir(cwd)
                ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
                os.execvpe(command[0], list(command), {**env, "TERM": "xterm"})
            finally:
                os._exit(127)

    def expect(self, text: str) -> str:
        """What has been shown up to and with `text`, since the last such call."""
        deadline = time.monotonic() + TIMEOUT_S
        while (found := self.shown.find(text, self._read)) < 0:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown!r}"
            assert self._more(), f"ended without {text!r}: {self.shown!r}"
        begin, self._read = self._read, found + len(text)
        return self.shown[begin : self._read]

    def grow(self, count: int) -> None:
        """Wait until so many more characters have been shown."""
        wanted, deadline = len(self.shown) + count, time.monotonic() + TIMEOUT_S
        while len(self.shown) < wanted:
            assert time.monotonic() < deadline, f"nothing comes after {self.shown!r}"
            assert self._more(), f"ended: {self.shown!r}"

    def type(self, text: str) -> None:
        """As from the keyboard."""
        os.write(self._file, text.encode())

    def press_until(self, key: str, text: str) -> None:
        """Press `key` until `text` is shown: Python's readline can miss a Ctrl-C until the next key."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.shown.find(text, self._read) < 0:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown!r}"
            self.type(key)
            again = time.monotonic() + 2.0
            while self.shown.find(text, self._read) < 0 and time.monotonic() < again:
                assert self._more(), f"ended without {text!r}: {self.shown!r}"
        self.expect(text)

    def end(self) -> int:
        """Wait until the command ends; its exit code."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._more():
            assert time.monotonic() < deadline, f"has not ended: {self.shown!r}"
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def _more(self) -> bool:
        """Reads what there is; False at the end."""
        if not select.select([self._file], [], [], 0.1)[0]:
            return True
        try:
            got = os.read(self._file, 65536)
        except OSError:
            # Linux's way to say that the other side has closed.
            return False
        self.shown += got.decode(errors="replace")
        return bool(got)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._status is None:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        os.close(self._file)
