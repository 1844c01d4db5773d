"""How the SDK is told to wait for samples: by the devices of the pool, or by the operator's word."""

from __future__ import annotations

from dataclasses import replace

import pytest
from flask import Flask
from sqlalchemy import delete

from gpu_pool.tables import UP, Host, SlotRow
from web.tinker.limits import client_config

SLOT = {"host": "h", "device_name": "d", "memory_bytes": 1, "threads": 1}


@pytest.mark.parametrize(
    ("polls", "kinds", "together"),
    [
        ("auto", {}, False),
        ("auto", {"cpu": True}, False),
        ("auto", {"cpu": True, "cuda": True}, True),
        ("auto", {"cpu": True, "cuda": False}, False),
        ("each", {"cuda": True}, False),
        ("together", {"cpu": True}, True),
    ],
)
def test_one_poll_for_all_where_there_is_an_accelerator(
    app: Flask,
    monkeypatch: pytest.MonkeyPatch,
    polls: str,
    kinds: dict[str, bool],
    together: bool,
) -> None:
    found = app.extensions["signal"]
    monkeypatch.setattr(found, "settings", replace(found.settings, sample_polls=polls))
    with found.db.writing() as session:
        session.add(Host(name="h", state=UP))
        session.flush()
        for kind, present in kinds.items():
            session.add(SlotRow(name=kind, kind=kind, present=present, **SLOT))
    try:
        with app.app_context():
            assert client_config()["sample_use_retrieve_futures"] is together
    finally:
        with found.db.writing() as session:
            session.execute(delete(SlotRow))
            session.execute(delete(Host))
