"""Where files live: one protocol, a local folder or a bucket behind it. Torch-free; knows only keys."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from workers.settings import Settings, s3_place
from workers.storage.local import LocalStorage
from workers.storage.protocol import MANIFEST, FileInfo, Storage, StorageAway

if TYPE_CHECKING:
    from workers.storage.s3 import S3Storage

__all__ = [
    "MANIFEST",
    "FileInfo",
    "LocalStorage",
    "Storage",
    "StorageAway",
    "artifact_key",
    "open_s3",
    "open_storage",
]


def open_storage(settings: Settings) -> Storage:
    """The storage that the settings name; connects to nothing yet.

    Raises ValueError that names SIGNAL_STORAGE when there is no such storage.
    """
    if settings.storage:
        return open_s3(settings.storage, settings.data_dir / "scratch")
    return LocalStorage(settings.data_dir / "store")


def open_s3(place: str, scratch: Path) -> S3Storage:
    """The storage in `s3://bucket/prefix`, with a local folder for what is not uploaded yet.

    Raises ValueError that names SIGNAL_STORAGE.
    """
    bucket, prefix = s3_place(place)
    if find_spec("boto3") is None:
        raise ValueError("SIGNAL_STORAGE names S3, for which boto3 is missing: pip install boto3")
    # Who keeps files in a folder must not pay for boto3.
    from workers.storage.s3 import S3Storage

    return S3Storage(bucket, prefix, scratch)


def artifact_key(run_id: str, name: str = "") -> str:
    """Where an artifact of a run lives (all of them, without a name)."""
    base = f"runs/{run_id}/artifacts"
    return f"{base}/{name}" if name else base
