"""Downloads: whole or not at all, resumed where they broke, never outside of the folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import rewardsignal as rs
from rewardsignal import _transport
from tests.unit.client.wire import RUN, Wire, reply

CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transport, "FIRST_PAUSE_S", 0.001)


def artifact(path: str = "adapter_model.safetensors", content: bytes = CONTENT) -> dict[str, Any]:
    file = {
        "path": path,
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "url": f"/runs/{RUN['run_id']}/artifacts/final/files/{path}",
    }
    return {"object": "artifact", "name": "final", "files": [file], "manifest": {}}


def made(*answers: Any, saved: dict[str, Any] | None = None) -> tuple[Wire, rs.SignalRun]:
    wire = Wire(reply(RUN), reply({"data": [saved or artifact()]}), *answers)
    run = wire.client().run(str(RUN["run_id"]))
    return wire, run


class Broken(httpx2.SyncByteStream):
    """A body that ends in the middle."""

    def __iter__(self) -> Iterator[bytes]:
        yield CONTENT[:1000]
        raise httpx2.ReadError("connection reset")


def test_download(tmp_path: Path) -> None:
    wire, run = made(httpx2.Response(200, content=CONTENT))
    assert run.download("final", tmp_path / "out") == tmp_path / "out"
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter_model.safetensors"]
    assert wire.requests[-1].headers["Authorization"] == "Bearer sk-test"


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(CONTENT)
    wire, run = made(httpx2.Response(500))
    run.download("final", tmp_path)
    assert len(wire.requests) == 2


def test_a_broken_connection_goes_on_where_it_stopped(tmp_path: Path) -> None:
    wire, run = made(
        httpx2.Response(200, stream=Broken()), httpx2.Response(206, content=CONTENT[1000:])
    )
    run.download("final", tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == CONTENT
    assert wire.requests[-1].headers["Range"] == "bytes=1000-"


def test_a_server_without_ranges_begins_anew(tmp_path: Path) -> None:
    _, run = made(httpx2.Response(200, stream=Broken()), httpx2.Response(200, content=CONTENT))
    run.download("final", tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == CONTENT


def test_a_damaged_file_is_not_kept(tmp_path: Path) -> None:
    _, run = made(httpx2.Response(200, content=CONTENT[:-1] + b"x"))
    with pytest.raises(rs.SignalAPIError, match="damaged"):
        run.download("final", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_server(tmp_path: Path) -> None:
    _, run = made(httpx2.Response(404, json={"error": {"code": "not_found", "message": "Gone."}}))
    with pytest.raises(rs.NotFoundError, match="Gone"):
        run.download("final", tmp_path)


def test_no_such_artifact(tmp_path: Path) -> None:
    _, run = made()
    with pytest.raises(rs.NotFoundError, match="other"):
        run.download("other", tmp_path)


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../evil", "..\\evil", ""])
def test_a_file_cannot_leave_the_folder(tmp_path: Path, path: str) -> None:
    _, run = made(httpx2.Response(200, content=CONTENT), saved=artifact(path))
    with pytest.raises(rs.SignalAPIError, match="outside"):
        run.download("final", tmp_path / "in")
    assert not (tmp_path / "evil").exists()


def test_tokenizer(tmp_path: Path) -> None:
    text = '{"model": "é"}'
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    file = {"name": "tokenizer.json", "size_bytes": 15, "sha256": sha256, "content": text}
    wire = Wire(reply({"name": "org/tiny", "files": [file]}))
    with wire.client() as client:
        client.download_tokenizer("org/tiny", tmp_path)
    assert wire.requests[0].url.path == "/models/org/tiny/tokenizer"
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == text
