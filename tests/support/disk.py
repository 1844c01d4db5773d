"""A small file system of a test's own, which it can fill without harm to anybody."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """`folder` on a file system of this size, in memory; False where this user may not mount one."""
    folder.mkdir(mode=0o700)
    options = f"size={megabytes}m,mode=700"
    try:
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            # Lazily: a process that was just killed may still hold it.
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def filled(folder: Path, leave: int) -> Iterator[None]:
    """All but `leave` bytes of the folder's file system are taken."""
    filler = folder / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            space = os.statvfs(folder)
            file.write(bytes(space.f_bavail * space.f_frsize - leave))
        yield
    finally:
        filler.unlink()
