"""What a process of the stack inherits, and what it must not."""

from __future__ import annotations

import pytest

from web.stack import environment


def test_foreign_options_do_not_reach_our_servers():
    base = {
        "PATH": "/bin",
        "PYTHONPATH": "/somewhere",
        "PYTHONHOME": "/elsewhere",
        "GUNICORN_CMD_ARGS": "--reload",
        "CELERY_BROKER_URL": "redis://other",
        "FLOWER_PORT": "1",
        "LISTEN_FDS": "1",
        "WEB_CONCURRENCY": "9",
    }
    assert set(environment.for_process(base, {})) == {
        "PATH",
        "HF_HUB_OFFLINE",
        "PYTHONSAFEPATH",
        "PYTHONUNBUFFERED",
    }


def test_own_settings_win_over_the_users():
    got = environment.for_process({"SIGNAL_DATA_DIR": "/theirs"}, {"SIGNAL_DATA_DIR": "/ours"})
    assert got["SIGNAL_DATA_DIR"] == "/ours"


@pytest.mark.parametrize(("allowed", "offline"), [("1", None), ("0", "1"), ("", "1")])
def test_the_hub_is_reached_only_where_it_is_allowed(allowed, offline):
    got = environment.for_process({"SIGNAL_ALLOW_HUB": allowed}, {})
    assert got.get("HF_HUB_OFFLINE") == offline


def test_only_settings_are_recorded():
    env = {
        "AWS_SECRET_ACCESS_KEY": "x",
        "REDIS_URL": "redis://",
        "SIGNAL_DEVICES": "auto",
        "HOME": "/",
    }
    assert environment.settings_of(env) == {"REDIS_URL": "redis://", "SIGNAL_DEVICES": "auto"}


def test_storage_in_s3_passes_and_its_credentials_are_not_recorded():
    where = {"SIGNAL_STORAGE": "s3://b/p", "AWS_ENDPOINT_URL": "http://s3", "AWS_REGION": "here"}
    secrets = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_SESSION_TOKEN": "x"}
    got = environment.for_process(where | secrets, {})
    assert where.items() | secrets.items() <= got.items()
    assert environment.settings_of(got) == where
    # Without S3, what AWS's own tools are told is nothing of the stack's.
    assert environment.settings_of({**got, "SIGNAL_STORAGE": ""}) == {"SIGNAL_STORAGE": ""}
