"""Builds `interpose.c` with the machine's C compiler, and sets the clock that it shows."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("interpose.c")
# LD_PRELOAD knows no way to name a path with a space or a colon, and a checkout may have one.
CACHE = Path("/tmp") / f"signal-chaos-{os.getuid()}"
NEEDED = "a C compiler (cc, gcc or clang), to jump the clock and to tear file operations"


def library() -> Path:
    """The preloadable library; skips the test where nothing here can build it."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), "")
    if not compiler:
        pytest.skip(NEEDED)
    built = CACHE / f"interpose-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if not built.exists():
        CACHE.mkdir(mode=0o700, exist_ok=True)
        aside = built.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(aside), str(SOURCE), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"{NEEDED}; this one fails: {done.stderr.splitlines()[0]}")
        os.replace(aside, built)
    return built


class Clock:
    """The wall clock of every process that was started with `environment`."""

    def __init__(self, file: Path) -> None:
        """It shows the true time until `shift`."""
        self._file = file
        file.write_bytes(struct.pack("=q", 0))
        self.environment = {"LD_PRELOAD": str(library()), "CHAOS_CLOCK": str(file)}

    def shift(self, seconds: int) -> None:
        """So far from the true time, from now on, in all of them at once."""
        # In place: the file is mapped.
        with self._file.open("r+b", buffering=0) as file:
            file.write(struct.pack("=q", seconds))
