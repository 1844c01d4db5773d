"""All settings of the server, read once from the environment and passed on.

Every process of a stack (web, projector, agent, run workers) builds the same `Settings`, so a setting
has one name and one default. Touches the environment and the secret file only.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MIB = 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """Times are in seconds, sizes in bytes."""

    data_dir: Path
    redis_url: str
    database_url: str
    secret: str
    models_file: Path
    doorbell: str = "each"
    sync_wait_s: float = 25.0
    max_poll_s: float = 25.0
    max_waits: int = 200
    result_ttl_s: int = 86_400
    gap_deadline_s: float = 1_800.0
    operation_deadline_s: float = 86_400.0
    max_body_bytes: int = 20 * MIB
    inline_bytes: int = 64 * 1024
    max_queued: int = 10_000
    max_queued_bytes: int = 1024 * MIB
    user_max_queued: int = 40_000
    user_max_queued_bytes: int = 2048 * MIB
    max_unsealed_bytes: int = 1024 * MIB
    max_active_runs: int = 32
    max_group: int = 64
    max_runs_per_worker: int = 8
    allow_hub: bool = False
    devices: str = "auto"
    storage: str = ""
    host_name: str = "localhost"
    hang_s: float = 600.0
    idle_pause_s: float = 1_800.0
    client_gone_s: float = 300.0
    outage_hold_s: float = 20.0
    sample_polls: str = "auto"
    snapshot_share: float = 0.02
    snapshot_max_operations: int = 1_000
    snapshot_max_bytes: int = 64 * MIB
    history_every: int = 100
    history_s: float = 7 * 86_400.0
    history_bytes: int = 10 * 1024 * MIB

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Settings from `SIGNAL_*` and `REDIS_URL`. Raises ValueError that names the variable."""
        env = os.environ if env is None else env
        data_dir = Path(_required(env, "SIGNAL_DATA_DIR"))
        return cls(
            data_dir=data_dir,
            redis_url=_required(env, "REDIS_URL"),
            database_url=env.get("SIGNAL_DATABASE_URL") or f"sqlite:///{data_dir / 'signal.db'}",
            secret=env.get("SIGNAL_SECRET") or _read_secret(data_dir / "secret"),
            models_file=Path(env.get("SIGNAL_MODELS") or data_dir / "models.json"),
            doorbell=_one_of(env, "SIGNAL_DOORBELL", ("each", "coalesced")),
            sync_wait_s=_number(env, "SIGNAL_SYNC_WAIT", 25.0, at_most=25.0),
            max_waits=int(_number(env, "SIGNAL_MAX_WAITS", 200)),
            result_ttl_s=int(_number(env, "SIGNAL_RESULT_TTL", 86_400)),
            gap_deadline_s=_number(env, "SIGNAL_GAP_DEADLINE", 1_800.0),
            operation_deadline_s=_number(env, "SIGNAL_OPERATION_DEADLINE", 86_400.0),
            max_body_bytes=int(_number(env, "SIGNAL_MAX_BODY_MB", 20) * MIB),
            max_queued=int(_number(env, "SIGNAL_MAX_QUEUED", 10_000)),
            max_queued_bytes=int(_number(env, "SIGNAL_MAX_QUEUED_MB", 1024) * MIB),
            user_max_queued=int(_number(env, "SIGNAL_USER_MAX_QUEUED", 40_000)),
            user_max_queued_bytes=int(_number(env, "SIGNAL_USER_MAX_QUEUED_MB", 2048) * MIB),
            max_unsealed_bytes=int(_number(env, "SIGNAL_MAX_UNSEALED_MB", 1024) * MIB),
            max_active_runs=int(_number(env, "SIGNAL_MAX_ACTIVE_RUNS", 32)),
            max_group=int(_number(env, "SIGNAL_MAX_GROUP", 64)),
            max_runs_per_worker=_count(env, "SIGNAL_MAX_RUNS_PER_WORKER", 8, at_most=256),
            allow_hub=_one_of(env, "SIGNAL_ALLOW_HUB", ("0", "1")) == "1",
            devices=env.get("SIGNAL_DEVICES") or "auto",
            storage=_storage(env),
            host_name=env.get("SIGNAL_HOST_NAME") or socket.gethostname(),
            hang_s=_number(env, "SIGNAL_HANG", 600.0),
            idle_pause_s=_number(env, "SIGNAL_IDLE_PAUSE", 1_800.0),
            client_gone_s=_number(env, "SIGNAL_CLIENT_GONE", 300.0),
            outage_hold_s=_number(env, "SIGNAL_OUTAGE_HOLD", 20.0, at_most=25.0),
            sample_polls=_one_of(env, "SIGNAL_SAMPLE_POLLS", ("auto", "each", "together")),
            snapshot_share=_number(env, "SIGNAL_SNAPSHOT_SHARE", 0.02, at_most=1.0),
            snapshot_max_operations=int(_number(env, "SIGNAL_SNAPSHOT_OPERATIONS", 1_000)),
            snapshot_max_bytes=int(_number(env, "SIGNAL_SNAPSHOT_MB", 64) * MIB),
            history_every=int(_number(env, "SIGNAL_HISTORY_EVERY", 100)),
            history_s=_number(env, "SIGNAL_HISTORY", 7 * 86_400.0),
            history_bytes=int(_number(env, "SIGNAL_HISTORY_MB", 10_240) * MIB),
        )


def s3_place(storage: str) -> tuple[str, str]:
    """Bucket and prefix of `s3://bucket/prefix`. Raises ValueError that names SIGNAL_STORAGE."""
    found = re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]+)(?:/(.*))?", storage)
    prefix = (found[2] or "").strip("/") if found else ""
    if found is None or (prefix and not set(prefix.split("/")).isdisjoint(("", ".", ".."))):
        raise ValueError(
            f"SIGNAL_STORAGE must be s3://bucket/prefix, or empty for a local folder, not {storage!r}"
        )
    return found[1], prefix


def _storage(env: Mapping[str, str]) -> str:
    value = env.get("SIGNAL_STORAGE") or ""
    if value:
        s3_place(value)
    return value


def _required(env: Mapping[str, str], name: str) -> str:
    value = env.get(name, "")
    if not value:
        raise ValueError(f"{name} is not set; `signal up` sets it for the processes that it starts")
    return value


def _one_of(env: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    value = env.get(name) or allowed[0]
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    return value


def _number(env: Mapping[str, str], name: str, default: float, *, at_most: float = 1e12) -> float:
    text = env.get(name)
    if not text:
        return float(default)
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} must be a number, not {text!r}") from None
    if not 0 < value <= at_most:
        raise ValueError(f"{name} must be above 0 and at most {at_most:g}, not {text}")
    return value


def _count(env: Mapping[str, str], name: str, default: int, *, at_most: int) -> int:
    value = _number(env, name, default, at_most=at_most)
    if value != int(value):
        raise ValueError(f"{name} must be a whole number, not {env[name]}")
    return int(value)


def _read_secret(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        raise ValueError(f"neither SIGNAL_SECRET nor {path} is there") from None
