"""Where files live: one protocol, a local folder behind it. Torch-free; knows no run, only keys."""

from pathlib import Path

from workers.storage.local import LocalStorage
from workers.storage.protocol import FileInfo, Storage

__all__ = ["FileInfo", "LocalStorage", "Storage", "artifact_key", "open_storage"]


def open_storage(data_dir: Path) -> Storage:
    """The storage of a stack with this data folder."""
    return LocalStorage(data_dir / "store")


def artifact_key(run_id: str, name: str = "") -> str:
    """Where an artifact of a run lives (all of them, without a name)."""
    base = f"runs/{run_id}/artifacts"
    return f"{base}/{name}" if name else base
