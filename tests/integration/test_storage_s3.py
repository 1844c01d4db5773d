"""Storage in S3: the contract on moto's server, and what an S3 server may do wrong."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import SignalError
from tests.support.proxy import CuttingProxy
from tests.support.s3 import BUCKET, running_s3, s3_environment
from tests.support.storage_contract import StorageContract, folder_of, keys_of
from tests.support.valkey import free_port, settings_for
from workers.storage import MANIFEST, StorageAway, open_storage
from workers.storage.s3 import S3Storage
from workers.storage.s3_upload import PART_BYTES


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_s3() as url, s3_environment(url):
        yield url


@pytest.fixture
def storage(server: str, tmp_path: Path) -> Iterator[S3Storage]:
    """A prefix of the test's own in the one bucket."""
    found = storage_at(tmp_path, f"tests/{random.randrange(1 << 40):x}")
    yield found
    found._client().close()


def storage_at(tmp_path: Path, prefix: str) -> S3Storage:
    url = f"s3://{BUCKET}/{prefix}"
    found = open_storage(settings_for(tmp_path, "redis://unused", storage=url))
    assert isinstance(found, S3Storage)
    return found


class TestS3Storage(StorageContract):
    pass


def test_all_is_below_the_prefix(storage: S3Storage, tmp_path: Path) -> None:
    storage.write("a/b", b"x")
    storage.check()
    whole = storage_at(tmp_path, "")
    assert keys_of(whole, storage._prefix.rstrip("/")) == [f"{storage._prefix}a/b"]
    with pytest.raises(ValueError, match="too long"):
        storage.write("a" * 1024, b"")


def test_a_large_file_goes_in_parts(storage: S3Storage) -> None:
    data = random.Random(1).randbytes(2 * PART_BYTES + 12_345)
    storage.put_folder("a/b", folder_of(storage, {"state": data}))
    assert storage.read("a/b/state") == data
    with storage.open("a/b/state") as file:
        file.seek(PART_BYTES - 3)
        assert file.read(10) == data[PART_BYTES - 3 : PART_BYTES + 7]
    with pytest.raises(FileExistsError):
        storage.put_folder("a/b", folder_of(storage, {"state": b"other" + data}))
    assert storage.read("a/b/state") == data


def test_more_files_than_one_answer_lists_or_one_request_deletes(storage: S3Storage) -> None:
    client = storage._client()
    names = [f"many/{number:04d}" for number in range(1003)]
    for name in names:
        client.put_object(Bucket=BUCKET, Key=storage._prefix + name, Body=b"")
    assert keys_of(storage, "many") == names
    storage.delete("many")
    assert storage.list("many") == []


def test_a_folder_that_a_dead_writer_left_is_made_anew(storage: S3Storage) -> None:
    for name in ("state", "old"):
        storage.write(f"a/b/{name}", b"half")
    storage.put_folder("a/b", folder_of(storage, {"state": b"whole"}))
    assert keys_of(storage, "a") == ["a/b/manifest.json", "a/b/state"]
    assert storage.read("a/b/state") == b"whole"


def test_the_manifest_comes_last_and_goes_first(
    storage: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    events = storage._client().meta.events
    events.register(
        "provide-client-params.s3.PutObject", lambda params, **_: seen.append(params["Key"])
    )
    storage.put_folder("a/b", folder_of(storage, {"z": b"x", "sub/manifest.json": b""}))
    assert [key.removeprefix(storage._prefix) for key in seen] == [
        "a/b/sub/manifest.json",
        "a/b/z",
        "a/b/manifest.json",
    ]
    gone: list[list[str]] = []
    events.register(
        "provide-client-params.s3.DeleteObjects",
        lambda params, **_: gone.append(
            [one["Key"].removeprefix(storage._prefix) for one in params["Delete"]["Objects"]]
        ),
    )
    storage.delete("a")
    assert gone == [["a/b/manifest.json", "a/b/sub/manifest.json"], ["a", "a/b/z"]]


def test_a_writer_that_meets_another_ones_file_gives_up(storage: S3Storage) -> None:
    folder = folder_of(storage, {"f": b"mine", "g": b"mine"})
    events = storage._client().meta.events

    def intrude(params: dict[str, Any], **_: Any) -> None:
        if params["Key"].endswith("/f"):
            storage.write("a/b/g", b"theirs")

    events.register("provide-client-params.s3.PutObject", intrude)
    with pytest.raises(FileExistsError):
        storage.put_folder("a/b", folder)
    assert storage.stat(f"a/b/{MANIFEST}") is None
    assert storage.read("a/b/g") == b"theirs"


def test_what_another_writer_took_for_leftovers_is_mended(storage: S3Storage) -> None:
    def intrude(params: dict[str, Any], **_: Any) -> None:
        if params["Key"].endswith(MANIFEST) and params["Body"] != b"gone":
            storage.delete("a/b/f")
            storage.write("a/b/g", b"theirs")

    storage._client().meta.events.register("provide-client-params.s3.PutObject", intrude)
    storage.put_folder("a/b", folder_of(storage, {"f": b"mine", "g": b"mine"}))
    assert storage.read("a/b/f") == storage.read("a/b/g") == b"mine"


def test_a_reader_never_mixes_two_versions(storage: S3Storage) -> None:
    storage.write("a", b"1" * 3_000_000)
    with storage.open("a") as file:
        assert file.read(1) == b"1"
        storage.write("a", b"2" * 3_000_000)
        with pytest.raises(OSError, match="PreconditionFailed"):
            file.read()


def test_unfinished_uploads_are_deleted_too(storage: S3Storage) -> None:
    client, name = storage._client(), f"{storage._prefix}a/b/state"
    upload = client.create_multipart_upload(Bucket=BUCKET, Key=name)
    other = client.create_multipart_upload(Bucket=BUCKET, Key=f"{storage._prefix}a/bc")
    client.upload_part(
        Bucket=BUCKET, Key=name, UploadId=upload["UploadId"], PartNumber=1, Body=b"secret"
    )
    storage.delete("a/b")
    left = client.list_multipart_uploads(Bucket=BUCKET, Prefix=storage._prefix)["Uploads"]
    assert [one["UploadId"] for one in left] == [other["UploadId"]]
    client.abort_multipart_upload(
        Bucket=BUCKET, Key=f"{storage._prefix}a/bc", UploadId=other["UploadId"]
    )


def test_lost_answers_change_nothing(storage: S3Storage, tmp_path: Path) -> None:
    """Each request may have been served before its answer was lost, conditional writes among them."""
    data = random.Random(2).randbytes(PART_BYTES + 1)
    files = {f"f{number}": f"{number}".encode() for number in range(6)} | {"large": data}
    # A PUT has two answers: "100 Continue" and its own.
    with CuttingProxy(storage._client().meta.endpoint_url, every=5) as proxy:
        with s3_environment(proxy.base_url):
            through = storage_at(tmp_path, storage._prefix.rstrip("/"))
            for number in range(4):
                through.write(f"b/{number}", b"x")
                assert through.read(f"b/{number}") == b"x"
            through.put_folder("a/b", folder_of(through, files))
            assert {name: through.read(f"a/b/{name}") for name in files} == files
            through.delete("b")
            through._client().close()
        assert proxy.cut >= 6
    assert keys_of(storage, "a") == [f"a/b/{name}" for name in sorted([*files, MANIFEST])]
    assert storage.list("b") == []


def test_a_bucket_that_is_not_there_is_trouble_and_not_emptiness(
    server: str, tmp_path: Path
) -> None:
    gone = S3Storage("no-such-bucket", "", tmp_path)
    for call in every_call(gone):
        with pytest.raises(StorageAway):
            call()
    gone._client().close()


def test_a_server_that_is_away_is_said_so_soon(tmp_path: Path) -> None:
    with s3_environment(f"http://127.0.0.1:{free_port()}"):
        away = storage_at(tmp_path, "")
        began = time.monotonic()
        for call in every_call(away):
            with pytest.raises(StorageAway):
                call()
        assert time.monotonic() - began < 60
        away._client().close()


def every_call(storage: S3Storage) -> list[Any]:
    return [
        lambda: storage.write("a/b", b"x"),
        lambda: storage.read("a/b"),
        lambda: storage.open("a/b"),
        lambda: storage.stat("a/b"),
        lambda: storage.list("a"),
        lambda: storage.delete("a"),
        lambda: storage.put_folder("a/c", folder_of(storage, {})),
        storage.check,
    ]


@contextmanager
def faulty(*answers: tuple[int, bytes]) -> Iterator[list[str]]:
    """A server that gives these answers, the last one for ever; what it was asked. Its environment is set.

    Of a 206 it sends all but the last byte.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append(f"{self.command} {self.headers.get('Range', '')}".strip())
            status, body = answers[min(len(asked), len(answers)) - 1]
            self.send_response(status)
            self.send_header("ETag", '"0"')
            self.send_header("Last-Modified", "Tue, 25 Nov 2025 00:00:00 GMT")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:-1] if status == 206 else body)
            self.close_connection = status == 206

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            with s3_environment(f"http://127.0.0.1:{server.server_address[1]}"):
                yield asked
        finally:
            server.shutdown()
            thread.join()


def error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>No.</Message></Error>".encode()


@pytest.mark.parametrize(
    ("status", "code"),
    [(507, "XMinioStorageFull"), (403, "QuotaExceeded"), (400, "XMinioAdminBucketQuotaExceeded")],
)
def test_a_full_bucket_is_named(tmp_path: Path, status: int, code: str) -> None:
    with faulty((status, error(code))):
        storage = storage_at(tmp_path, "")
        with pytest.raises(SignalError, match="storage_full"):
            storage.write("a", b"x")
        storage._client().close()


def test_a_folder_that_does_not_fit_is_taken_back(
    storage: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(params: dict[str, Any], **_: Any) -> None:
        if params["Key"].endswith("/g"):
            raise SignalError("storage_full")

    storage._client().meta.events.register("provide-client-params.s3.PutObject", full)
    with pytest.raises(SignalError, match="storage_full"):
        storage.put_folder("a/b", folder_of(storage, {"f": b"x", "g": b"x"}))
    assert storage.list("a") == []


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError")])
def test_trouble_that_passes_is_waited_for_and_no_longer(
    tmp_path: Path, status: int, code: str
) -> None:
    with faulty((status, error(code)), (200, b"there")) as asked:
        storage = storage_at(tmp_path, "")
        assert storage.read("a") == b"there" and len(asked) == 2
        storage._client().close()
    with faulty((status, error(code))) as asked:
        storage = storage_at(tmp_path, "")
        with pytest.raises(StorageAway, match=code):
            storage.read("a")
        assert len(asked) == 3
        storage._client().close()


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "RequestTimeTooSkewed"])
def test_a_refusal_is_not_taken_for_an_answer(tmp_path: Path, code: str) -> None:
    with faulty((403, error(code))):
        storage = storage_at(tmp_path, "")
        for call in every_call(storage):
            with pytest.raises(StorageAway):
                call()
        storage._client().close()


def test_a_stream_that_breaks_off_is_gone_on_with(tmp_path: Path) -> None:
    with faulty((200, b"0123"), (206, b"0123"), (206, b"3x")) as asked:
        storage = storage_at(tmp_path, "")
        with storage.open("a") as file:
            assert file.read() == b"0123"
        assert asked == ["HEAD", "GET bytes=0-3", "GET bytes=3-3"]
        storage._client().close()
    with faulty((206, b"0123"), (200, b"0123")) as asked:
        storage = storage_at(tmp_path, "")
        assert storage.read("a") == b"0123" and asked == ["GET", "GET"]
        storage._client().close()
    with faulty((200, b"0123"), (206, b"0")) as asked:
        storage = storage_at(tmp_path, "")
        with storage.open("a") as file, pytest.raises(StorageAway):
            file.read()
        assert asked == ["HEAD", *3 * ["GET bytes=0-3"]]
        storage._client().close()


def test_a_server_without_conditional_writes_is_used_all_the_same(
    storage: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ClientError

    client = storage._client()
    real, asked = client.put_object, []

    def put_object(**params: Any) -> Any:
        asked.append("IfNoneMatch" in params)
        if asked[-1]:
            raise ClientError({"Error": {"Code": "NotImplemented"}}, "PutObject")
        return real(**params)

    monkeypatch.setattr(client, "put_object", put_object)
    storage.put_folder("a/b", folder_of(storage, {"f": b"x"}))
    assert asked == [True, False, False]
    assert json.loads(storage.read("a/b/manifest.json") or b"") == ["f"]


def test_a_silent_server_holds_nobody_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.config import Config

    from workers.storage import s3

    monkeypatch.setattr(s3, "CONFIG", s3.CONFIG.merge(Config(read_timeout=0.3)))
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, s3_environment(f"http://127.0.0.1:{silent.getsockname()[1]}"):
        storage = storage_at(tmp_path, "")
        with pytest.raises(StorageAway, match="timeout"):
            storage.read("a")
        storage._client().close()
