"""`signal doctor`: checks this machine, and says with each finding how to mend it. Changes nothing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gpu_pool.devices import gpu_slots
from web.stack import ports, redis_server, state
from web.stack.errors import StackError
from web.stack.folder import Folder
from web.stack.redis_server import find_binary
from workers.model_folder import ModelFolderError, read_model_folder
from workers.storage import open_s3

GB = 1_000_000_000
LEAST_MEMORY, LEAST_DISK = 4 * GB, 2 * GB
PORT = 8000


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `ok`, `warning` or `error`; `mend` says what to do about it."""

    level: str
    about: str
    message: str
    mend: str = ""

    def to_dict(self) -> dict[str, str]:
        """As JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """One or two lines for people."""
        line = f"{self.level:<8} {self.about}: {self.message}"
        return f"{line}\n         -> {self.mend}" if self.mend else line


def examine(folder: Folder) -> list[Finding]:
    """Every check."""
    checks = (
        _python(),
        _torch(),
        _cpu(),
        _driver(),
        _memory(),
        _disk(folder),
        _storage(folder),
        _redis(),
        _port(folder),
        *_permissions(folder),
        *_models(folder),
    )
    return list(checks)


def _python() -> Finding:
    running = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("ok", "python", f"{running} at {sys.executable}")
    return Finding("error", "python", running, "use Python 3.11, 3.12 or 3.13")


def _torch() -> Finding:
    # From the metadata: importing torch takes seconds, and the web tier must do without it.
    try:
        build = version("torch")
    except PackageNotFoundError:
        return Finding(
            "error", "torch", "not installed", "pip install 'signal-server[worker]', or make setup"
        )
    return Finding("ok", "torch", f"{build}, transformers {_version('transformers')}")


def _cpu() -> Finding:
    cores = len(os.sched_getaffinity(0))
    flags: set[str] = set()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.partition(":")[2].split())
                break
    known = [
        flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimd") if flag in flags
    ]
    text = f"{cores} cores, {', '.join(known) or 'no vector extensions that torch uses'}"
    if known:
        return Finding("ok", "cpu", text)
    return Finding(
        "warning", "cpu", text, "training will be slow; a CPU with AVX2 is 4 times faster"
    )


def _driver() -> Finding:
    gpus = gpu_slots()
    if gpus:
        named = ", ".join(f"{gpu.device_name} ({gpu.memory_bytes / GB:.0f} GB)" for gpu in gpus)
        if "+cpu" in _version("torch"):
            return Finding("warning", "gpu", named, "torch is the CPU build: make setup TORCH=cuda")
        return Finding("ok", "gpu", named)
    if shutil.which("nvidia-smi"):
        mend = "run nvidia-smi to see why; the driver and its libraries must have the same version"
        return Finding("warning", "gpu", "the NVIDIA driver does not answer", mend)
    return Finding("ok", "gpu", "none; runs use the CPU")


def _memory() -> Finding:
    available = 0
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    text = f"{available / GB:.1f} GB free"
    if available >= LEAST_MEMORY:
        return Finding("ok", "memory", text)
    mend = "close other programs, or name fewer slots: signal up --devices cpu:1"
    return Finding("warning", "memory", text, mend)


def _disk(folder: Folder) -> Finding:
    place = _existing(folder.root)
    free = shutil.disk_usage(place).free
    text = f"{free / GB:.1f} GB free at {place}"
    if free >= LEAST_DISK:
        return Finding("ok", "disk", text)
    return Finding("error", "disk", text, "free some space, or choose another --data-dir")


def _storage(folder: Folder) -> Finding:
    place = os.environ.get("SIGNAL_STORAGE")
    if not place:
        return Finding("ok", "storage", f"the folder {folder.root / 'store'}")
    try:
        open_s3(place, folder.root / "scratch").check()
    except ValueError as error:
        return Finding("error", "storage", str(error), "unset SIGNAL_STORAGE to use a folder")
    except OSError as error:
        mend = "see AWS_ENDPOINT_URL, AWS_REGION, the credentials, and that the bucket is there"
        return Finding("error", "storage", f"{place}: {error}", mend)
    return Finding("ok", "storage", f"{place} answers")


def _redis() -> Finding:
    if url := os.environ.get("REDIS_URL"):
        with suppress(StackError):
            if redis_server.serves(url):
                return Finding("ok", "redis", "the server that REDIS_URL names answers")
        mend = "start that server, or unset REDIS_URL to have one started"
        return Finding("error", "redis", "the server that REDIS_URL names does not answer", mend)
    try:
        return Finding("ok", "redis", f"{find_binary()}")
    except StackError as error:
        return Finding("error", "redis", "no server program", str(error))


def _port(folder: Folder) -> Finding:
    found = state.read(folder)
    if found and found.supervised():
        return Finding("ok", "port", f"a stack serves at {found.base_url}")
    try:
        ports.listen("127.0.0.1", PORT).close()
    except StackError as error:
        return Finding("warning", "port", str(error), "signal up --port 0")
    return Finding("ok", "port", f"{PORT} is free")


def _permissions(folder: Folder) -> Iterator[Finding]:
    if not folder.root.exists():
        place = _existing(folder.root)
        if os.access(place, os.W_OK):
            yield Finding("ok", "data folder", f"{folder.root} will be made")
        else:
            mend = "choose another --data-dir"
            yield Finding("error", "data folder", f"{place} cannot be written to", mend)
        return
    if not os.access(folder.root, os.W_OK):
        mend = f"sudo chown {os.getuid()} '{folder.root}', or choose another --data-dir"
        yield Finding("error", "data folder", f"{folder.root} cannot be written to", mend)
        return
    open_to_others = [
        path
        for path in (folder.root, folder.secret, folder.api_key, folder.flower_login, folder.state)
        if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077
    ]
    for path in open_to_others:
        mode = "700" if path.is_dir() else "600"
        yield Finding("error", "data folder", f"others can read {path}", f"chmod {mode} '{path}'")
    if not open_to_others:
        yield Finding("ok", "data folder", f"{folder.root}, closed to others")


def _models(folder: Folder) -> Iterator[Finding]:
    listed = Path(os.environ.get("SIGNAL_MODELS") or folder.root / "models.json")
    if not listed.exists():
        mend = "signal up --model NAME=FOLDER; `make model` fetches one for a trial"
        yield Finding("warning", "models", "none are named yet", mend)
        return
    try:
        models = json.loads(listed.read_text())["models"]
        folders = {str(model["name"]): listed.parent / str(model["path"]) for model in models}
    except (OSError, ValueError, KeyError, TypeError) as error:
        mend = "remove it, and name the models again with --model"
        yield Finding("error", "models", f"{listed} cannot be read: {error}", mend)
        return
    for name, model_folder in folders.items():
        yield _model(name, model_folder)


def _model(name: str, path: Path) -> Finding:
    try:
        model = read_model_folder(name, path)
    except (ModelFolderError, OSError) as error:
        mend = f"put the folder back, or name another: signal up --model {name}=FOLDER"
        return Finding("error", "models", f"{name}: {error}", mend)
    return Finding("ok", "models", f"{name} in {model.path}")


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
