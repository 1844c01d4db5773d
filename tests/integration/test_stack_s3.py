"""A whole stack with its storage in S3: large bodies, saved states, downloads, doctor, erasure."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import stack as stacks
from tests.support.api import Api
from tests.support.inside import Inside, until
from tests.support.s3 import BUCKET, environment, running_s3, s3_environment
from tests.support.stack import RunningStack
from tests.support.valkey import free_port, settings_for
from workers.storage import Storage, open_storage

PLACE = f"s3://{BUCKET}/some/prefix"
# More than 64 KB once it is packed.
LARGE = {"batch_data": [{"tokens": [5 + (row + n) % 60 for n in range(250)]} for row in range(40)]}


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """What leads a stack to a server of its own."""
    with running_s3() as url:
        often = {"SIGNAL_SNAPSHOT_SHARE": "1", "SIGNAL_SNAPSHOT_OPERATIONS": "1"}
        yield {"SIGNAL_STORAGE": PLACE, **often, **environment(url)}


@pytest.fixture(scope="module")
def s3_stack(
    s3: dict[str, str], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningStack]:
    data_dir = tmp_path_factory.mktemp("s3 stack") / "data"
    model = ("--model", f"tiny={tiny_model}")
    yield stacks.up(data_dir, *model, "--devices", "cpu:1x1", env=s3)
    stacks.down(data_dir)


@pytest.fixture
def bucket(s3: dict[str, str], tmp_path: Path) -> Iterator[Storage]:
    """The stack's storage, seen from outside."""
    with s3_environment(s3["AWS_ENDPOINT_URL"]):
        yield open_storage(settings_for(tmp_path, "redis://unused", storage=PLACE))


def test_a_run_lives_in_the_bucket(s3_stack: RunningStack, bucket: Storage) -> None:
    with Api(s3_stack) as api:
        with api.run() as run:
            result = run.ok("/forward_backward", LARGE)
            assert result["num_tokens"] == 40 * 249
            run.ok("/optim_step")
            saved = run.ok("/save_state", {"name": "one"})
        keys = [info.key for info in bucket.list(f"runs/{run.id}")]
        assert any("/bodies/" in key for key in keys), keys
        assert f"runs/{run.id}/artifacts/one/manifest.json" in keys
        assert not (s3_stack.data_dir / "store").exists()
        _downloads_in_ranges(api, saved["artifact_uri"], saved["manifest"]["files"])
        assert api.delete(f"/runs/{run.id}").status_code == 204
        assert bucket.list(f"runs/{run.id}") == []


def test_a_killed_worker_is_rebuilt_from_the_bucket(
    s3_stack: RunningStack, bucket: Storage
) -> None:
    with Api(s3_stack) as api, Inside(s3_stack) as inside:
        losses = []
        for killed in (False, True):
            with api.run(seed=1) as run:
                run.ok("/forward_backward", LARGE)
                run.ok("/optim_step", {"learning_rate": 0.01})
                until(lambda: bucket.list(f"runs/{run.id}/snapshots"))
                if killed:
                    os.kill(inside.worker_pids(run.id)[1], signal.SIGKILL)
                losses.append(run.ok("/forward_backward", LARGE)["loss"])
        assert losses[0] == losses[1]


def _downloads_in_ranges(api: Api, uri: str, files: list[dict[str, object]]) -> None:
    for file in files:
        url, size = f"{uri}/files/{file['path']}", int(str(file["size_bytes"]))
        whole = api.get(url)
        assert whole.status_code == 200 and len(whole.content) == size
        assert hashlib.sha256(whole.content).hexdigest() == file["sha256"]
        assert whole.headers["ETag"] == f'"{file["sha256"]}"'
        for given, part in (
            ("10-19", slice(10, 20)),
            ("-7", slice(-7, None)),
            ("5-", slice(5, None)),
        ):
            answer = api.get(url, headers={"Range": f"bytes={given}"})
            assert answer.status_code == 206 and answer.content == whole.content[part]
        assert api.get(url, headers={"If-None-Match": whole.headers["ETag"]}).status_code == 304
        beyond = api.get(url, headers={"Range": f"bytes={size}-"})
        assert beyond.status_code == 416


def test_doctor_asks_the_bucket(s3: dict[str, str], tmp_path: Path) -> None:
    def storage_line(**changes: str) -> dict[str, str]:
        done = stacks.attempt("doctor", "--json", "--data-dir", tmp_path, env={**s3, **changes})
        findings = json.loads(done.stdout)["findings"]
        return next(finding for finding in findings if finding["about"] == "storage")

    assert storage_line()["level"] == "ok"
    lacks = storage_line(SIGNAL_STORAGE="s3://no-such-bucket")
    assert (lacks["level"], "NoSuchBucket" in lacks["message"]) == ("error", True)
    away = storage_line(AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}")
    assert away["level"] == "error" and "AWS_ENDPOINT_URL" in away["mend"]
    assert storage_line(SIGNAL_STORAGE="/srv")["mend"].startswith("unset SIGNAL_STORAGE")
    assert storage_line(SIGNAL_STORAGE="")["message"].startswith("the folder")


def test_up_names_a_storage_that_it_does_not_know(tmp_path: Path) -> None:
    done = stacks.attempt(
        *("up", "--detach", "--port", "0", "--data-dir", tmp_path / "data"),
        env={"SIGNAL_STORAGE": "gs://bucket"},
    )
    assert done.returncode == 1 and "SIGNAL_STORAGE" in done.stderr
