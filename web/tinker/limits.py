"""What the SDK is told to keep to: no more polls, and results read at once, than a web process holds."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from gpu_pool.database import Database
from gpu_pool.tables import SlotRow
from web.context import services
from web.tinker import completions

# A client may have so many samples under way that this many clients find a place for all of their polls.
CLIENTS, MOST_AT_LEAST = 4, 8


def client_config() -> dict[str, Any]:
    """The flags of `client/config` that are not the SDK's own defaults."""
    most = max(MOST_AT_LEAST, services().settings.max_waits // CLIENTS)
    return {
        "pjwt_auth_enabled": False,
        "parallel_fwdbwd_chunks": True,
        "proto_compress_fwdbwd": False,
        "sample_max_concurrent_requests": most,
        "sample_use_retrieve_futures": _polls_together(),
        "inflight_response_bytes_semaphore_size": completions.READ_BYTES,
        "sample_join_sampling_session": True,
        "custom_loss_server_side": False,
    }


def _polls_together() -> bool:
    """Whether one poll waits for all samples of a client.

    A poll for each costs two requests fewer, and a short sample takes a quarter less, but it bounds how many
    can be under way. That matters where an accelerator works on more at once than threads here can wait for.
    """
    chosen = services().settings.sample_polls
    return chosen == "together" or (chosen == "auto" and _has_accelerator(services().db))


def _has_accelerator(db: Database) -> bool:
    query = select(SlotRow.id).where(SlotRow.present, SlotRow.kind != "cpu").limit(1)
    with db.reading() as session:
        return session.scalar(query) is not None
