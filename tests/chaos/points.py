"""Arming the fail-points of `workers.failpoints` in a running stack, and seeing who ran into them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.inside import until


@dataclass(frozen=True)
class Hit:
    """A process stood at a point: its pid, and the epoch seconds."""

    pid: int
    at: float


class Points:
    """The folder that SIGNAL_FAILPOINTS names."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made when it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def arm(self, name: str, action: str, *, when: str = "", after: int = 0) -> None:
        """The next matching pass of `name`, once `after` have gone by, does `action`."""
        self.disarm(name)
        lines = [f"when:{when}"] * bool(when) + [f"after:{after}"] * bool(after) + [action]
        aside = self.folder / f".{name}.new"
        aside.write_text("\n".join(lines))
        os.replace(aside, self.folder / name)

    def hit(self, name: str) -> Hit | None:
        """Who ran into it since it was armed."""
        for path in self.folder.glob(f"{name}.hit.*"):
            with suppress(FileNotFoundError):  # disarmed a moment ago
                return Hit(int(path.name.rpartition(".")[2]), path.stat().st_ctime)
        return None

    def await_hit(self, name: str, seconds: float = 30.0) -> Hit:
        """Waits for somebody to run into it."""
        return until(lambda: self.hit(name), seconds)

    def release(self, name: str) -> None:
        """Lets whoever waits at the point go on."""
        (self.folder / f"{name}.go").touch()

    def disarm(self, name: str) -> None:
        """Nothing of it is left; who waits there must have been released before."""
        for suffix in ("", ".passes", ".go"):
            (self.folder / f"{name}{suffix}").unlink(missing_ok=True)
        for path in self.folder.glob(f"{name}.hit.*"):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Releases everybody and disarms everything."""
        for path in list(self.folder.glob("*.hit.*")):
            self.release(path.name.partition(".hit.")[0])
        time.sleep(0.02)
        for path in self.folder.iterdir():
            path.unlink(missing_ok=True)

    @contextmanager
    def halted(self, name: str, *, when: str = "", after: int = 0) -> Iterator[Hit]:
        """Somebody stands still at the point while the block runs."""
        self.arm(name, "wait", when=when, after=after)
        try:
            yield self.await_hit(name)
        finally:
            self.release(name)
