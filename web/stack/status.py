"""`signal status`: what runs, read from stack.json, SQL and Redis. Changes nothing."""

from __future__ import annotations

from contextlib import closing
from datetime import datetime
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from gpu_pool import overview
from gpu_pool.database import Database
from web.stack import state
from web.stack.accounts import settings_of
from web.stack.folder import Folder
from workers.queue import keys
from workers.queue.journal import Journal, connect
from workers.queue.records import Head
from workers.settings import Settings
from workers.storage import open_storage


def gather(folder: Folder) -> dict[str, Any]:
    """Everything, as plain values."""
    found = state.read(folder)
    alive = [process for process in found.everyone() if process.alive()] if found else []
    report: dict[str, Any] = {"running": bool(alive), "data_dir": str(folder.root)}
    if found is None or not alive:
        return report
    settings = settings_of(folder)
    report |= _processes(found) | _pool(settings) | _journals(settings)
    beside = {
        held["run_id"]: len(device["runs"]) - 1
        for device in report["devices"]
        for held in device["runs"]
    }
    for run in report["runs"]:
        run["sharing_with"] = beside.get(run["run_id"], 0)
    return report


def _processes(found: state.State) -> dict[str, Any]:
    return {
        "ready": found.ready,
        "pid": found.supervisor.pid,
        "supervised": found.supervised(),
        "base_url": found.base_url,
        "flower_url": found.flower_url or None,
        "started_at": found.started_at,
        "processes": [
            {
                "name": name,
                "pid": process.pid,
                "alive": process.alive(),
                "restarts": found.restarts.get(name, 0),
            }
            for name, process in found.processes.items()
        ],
    }


def _pool(settings: Settings) -> dict[str, Any]:
    try:
        with closing(Database(settings.database_url)) as db, db.reading() as session:
            pool = overview.describe(session)
    except SQLAlchemyError as error:
        return {"devices": [], "queued": [], "paused": [], "database_error": str(error)}
    return {
        "devices": _plain(pool["slots"]),
        "queued": _plain(pool["queued"]),
        "paused": _plain(pool["paused"]),
    }


def _journals(settings: Settings) -> dict[str, Any]:
    redis = connect(settings.redis_url)
    try:
        journal = Journal(redis, open_storage(settings), settings)
        run_ids = journal.open_runs()
        bound = settings.max_unsealed_bytes
        runs = [_run(redis, head, bound) for head in journal.heads(run_ids) if head is not None]
        return {"runs": runs, "redis_bytes": redis.info("memory")["used_memory"]}
    except (RedisError, OSError) as error:
        return {"runs": [], "redis_error": str(error)}
    finally:
        redis.close()


def _run(redis: Redis, head: Head, bound: int) -> dict[str, Any]:
    return {
        "run_id": head.run_id,
        "worker": head.worker or None,
        "worker_state": head.worker_state or None,
        "hold": head.hold or None,
        "recovery_s": head.recovery_s,
        "state": head.state,
        "journal": {
            "entries": head.entries,
            "last_seq": head.seq_count,
            "applied_seq": head.applied,
            "waiting": head.unfinished,
            "unsealed": head.seq_count - head.base,
            # What Redis holds of its bodies and results, and the most that it can be asked to.
            "redis_bytes": head.unsealed_bytes,
            "redis_bytes_bound": bound,
        },
        "queue": {"name": keys.queue(head.run_id), "length": redis.llen(keys.queue(head.run_id))},
    }


def _plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: _plain_value(value) for name, value in row.items()} for row in rows]


def _plain_value(value: Any) -> Any:
    if isinstance(value, list):
        return _plain(value)
    return value.isoformat() if isinstance(value, datetime) else value


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    if not report["running"]:
        return f"Nothing runs on {report['data_dir']} (start it with `signal up`)."
    lines = [f"{report['base_url']}, data in {report['data_dir']}"]
    if not report["supervised"]:
        lines.append(
            "The supervisor is gone: nothing is restarted. `signal up` takes over, `signal down` stops all."
        )
    lines += _section("Processes", map(_process_line, report["processes"]))
    lines += _section("Devices", map(_device_line, report["devices"]))
    lines += _section("Runs", map(_run_line, report["runs"]))
    lines += _section("Waiting for a device", map(_waiting_line, report["queued"]))
    lines += [report[name] for name in ("database_error", "redis_error") if name in report]
    return "\n".join(lines)


def _section(title: str, rows: Any) -> list[str]:
    listed = [f"  {row}" for row in rows] or ["  none"]
    return [f"{title}:", *listed]


def _process_line(row: dict[str, Any]) -> str:
    life = "" if row["alive"] else ", dead"
    restarts = f", restarted {row['restarts']} times" if row["restarts"] else ""
    return f"{row['name']:<10} pid {row['pid']}{life}{restarts}"


def _device_line(row: dict[str, Any]) -> str:
    held = ", ".join(run["run_id"] for run in row["runs"])
    user = f" by {held}" if held else ""
    return f"{row['name']:<10} {row['device']}, {row['threads']} threads, {row['state']}{user}"


def _waiting_line(row: dict[str, Any]) -> str:
    return f"{row['run_id']}{', to go on' if row['epoch'] else ''}"


def _run_state(row: dict[str, Any]) -> str:
    """One word: a run that is to be paused still has its worker for a while."""
    if row["hold"] == "paused" and row["worker"]:
        return "pausing"
    return str(row["hold"] or row["worker_state"] or "queued")


def _beside(others: int) -> str:
    return f" beside {others} other{'s' if others > 1 else ''}" if others else ""


def _run_line(row: dict[str, Any]) -> str:
    journal = row["journal"]
    held, bound = journal["redis_bytes"] / 1e6, journal["redis_bytes_bound"] / 1e6
    return (
        f"{row['run_id']}  {_run_state(row)}{_beside(row['sharing_with'])}, {journal['waiting']} waiting, "
        f"{journal['unsealed']} of {journal['entries']} in Redis with {held:.1f} of at most {bound:.0f} MB, "
        f"{row['queue']['length']} doorbells"
    )
