"""The bundled server's configuration: safe on a shared host, and in a folder of any name."""

from __future__ import annotations

import stat

from web.stack import redis_server
from web.stack.folder import Folder


def test_configuration(tmp_path):
    folder = Folder(tmp_path / 'a "b" c')
    folder.prepare()
    path = redis_server.write_config(folder, 1234)
    text = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for line in ("bind 127.0.0.1", "port 1234", "appendonly yes", "maxmemory-policy noeviction"):
        assert f"{line}\n" in text
    assert f'requirepass "{redis_server.password(folder)}"\n' in text
    assert 'a \\"b\\" c/redis"\n' in text


def test_the_password_is_kept_and_in_the_url(tmp_path):
    folder = Folder(tmp_path)
    folder.prepare()
    password = redis_server.password(folder)
    assert len(password) >= 32
    assert redis_server.url(folder, 5) == f"redis://:{password}@127.0.0.1:5/0"


def test_the_wheel_brings_a_server():
    assert redis_server.find_binary().name in ("redis-server", "valkey-server")
