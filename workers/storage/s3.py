"""Storage in a bucket of S3 or of any server that speaks its protocol.

Address, region and credentials come from the environment that AWS's own tools read (AWS_ENDPOINT_URL,
AWS_REGION, AWS_ACCESS_KEY_ID, a profile, an instance's role). Connects at its first use.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from schemas.errors import SignalError
from workers.storage.aside import Aside
from workers.storage.protocol import MANIFEST, FileInfo, StorageAway, parts_of
from workers.storage.s3_delete import delete_folder, delete_names
from workers.storage.s3_errors import is_missing, translated
from workers.storage.s3_reader import ATTEMPTS, PAUSE_S, RangeReader
from workers.storage.s3_upload import Uploader, md5_of

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import HeadObjectOutputTypeDef, ObjectTypeDef

LONGEST_NAME = 1024
READ_BUFFER = 256 * 1024
# A server that is silent holds a caller for three times 15 s, one that is not there for less than 10 s.
CONFIG = Config(
    connect_timeout=2,
    read_timeout=15,
    retries={"mode": "standard", "total_max_attempts": 3},
    max_pool_connections=16,
    tcp_keepalive=True,
    # Not every server takes the checksums that the library sends by default; we send an MD5 with each body.
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
)


class S3Storage:
    """Objects below one prefix of one bucket; for any thread."""

    def __init__(self, bucket: str, prefix: str, scratch: Path) -> None:
        """`scratch` is the local folder for what is not uploaded yet."""
        self.bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._aside = Aside(scratch)
        self._lock = threading.Lock()
        self._made: tuple[int, S3Client] | None = None

    def check(self) -> None:
        """Raises OSError when the bucket does not answer as it must."""
        with translated():
            self._client().list_objects_v2(Bucket=self.bucket, Prefix=self._prefix, MaxKeys=1)

    def write(self, key: str, data: bytes) -> None:
        """See `Storage.write`."""
        name = self._name(key)
        with translated():
            self._client().put_object(
                Bucket=self.bucket, Key=name, Body=data, ContentMD5=md5_of(data)
            )

    def read(self, key: str) -> bytes | None:
        """See `Storage.read`."""
        name = self._name(key)
        for attempt in range(1, ATTEMPTS + 1):
            body = self._get(name)
            try:
                with translated():
                    return None if body is None else body.read()
            except StorageAway:
                # The stream broke off, which the library does not repeat.
                if attempt == ATTEMPTS:
                    raise
            time.sleep(PAUSE_S * attempt)
        raise AssertionError("unreachable")

    def open(self, key: str) -> BinaryIO:
        """See `Storage.open`."""
        name, client = self._name(key), self._client()
        found = self._head(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no such file in storage", key)

        def fetch(start: int, end: int) -> StreamingBody:
            # Always of the version that was found, never half of another.
            answer = client.get_object(
                Bucket=self.bucket,
                Key=name,
                IfMatch=found["ETag"],
                Range=f"bytes={start}-{end - 1}",
            )
            return answer["Body"]

        return io.BufferedReader(RangeReader(fetch, found["ContentLength"]), READ_BUFFER)

    def stat(self, key: str) -> FileInfo | None:
        """See `Storage.stat`."""
        found = self._head(self._name(key))
        if found is None:
            return None
        return FileInfo(key, found["ContentLength"], found["LastModified"].timestamp())

    def put_folder(self, key: str, folder: Path) -> None:
        """See `Storage.put_folder`."""
        base = self._name(key) + "/"
        paths = {base + path.relative_to(folder).as_posix(): path for path in _files(folder)}
        manifest = base + MANIFEST
        if manifest not in paths:
            raise ValueError(f"{folder} has no {MANIFEST}")
        self._make_room(key, manifest)
        uploader = Uploader(self._client(), self.bucket)
        order = sorted(paths, key=lambda name: (name == manifest, name))
        sent: dict[str, str] = {}
        try:
            for name in order:
                sent[name] = uploader.put(name, paths[name])
        except SignalError:
            # A full bucket must not be filled with what nobody will read.
            with suppress(OSError, SignalError):
                delete_names(self._client(), self.bucket, sent)
            raise
        self._look_again(base, sent, paths, uploader)
        shutil.rmtree(folder, ignore_errors=True)

    def list(self, prefix: str) -> list[FileInfo]:
        """See `Storage.list`."""
        skip = len(self._prefix)
        infos = [
            FileInfo(found["Key"][skip:], found["Size"], found["LastModified"].timestamp())
            for found in self._objects(self._name(prefix) + "/")
        ]
        return sorted(infos, key=lambda info: info.key)

    def delete(self, prefix: str) -> None:
        """See `Storage.delete`."""
        delete_folder(self._client(), self.bucket, self._name(prefix))

    def scratch(self, room: int = 0) -> Path:
        """See `Storage.scratch`."""
        return self._aside.scratch(room)

    def _make_room(self, key: str, manifest: str) -> None:
        """Removes what a writer left that died; refuses a folder that is whole."""
        found = [one["Key"] for one in self._objects(self._name(key) + "/")]
        if manifest in found:
            raise FileExistsError(errno.EEXIST, "storage has this folder", key)
        if found:
            self.delete(key)

    def _look_again(
        self, base: str, sent: dict[str, str], paths: dict[str, Path], uploader: Uploader
    ) -> None:
        """Mends what another writer of this folder took for leftovers while we were writing.

        Ours is the manifest, so the other one has failed or will.
        """
        try:
            found = {one["Key"]: one["ETag"] for one in self._objects(base)}
        except StorageAway:
            return  # all is stored, and nothing says that anybody was here
        for name in sent:
            if found.get(name) != sent[name]:
                uploader.replace(name, paths[name])

    def _head(self, name: str) -> HeadObjectOutputTypeDef | None:
        with translated():
            try:
                return self._client().head_object(Bucket=self.bucket, Key=name)
            except ClientError as error:
                if not is_missing(error):
                    raise
        # To a HEAD, a bucket that is gone looks like a file that is not there.
        self.check()
        return None

    def _get(self, name: str) -> StreamingBody | None:
        with translated():
            try:
                return self._client().get_object(Bucket=self.bucket, Key=name)["Body"]
            except ClientError as error:
                if is_missing(error):
                    return None
                raise

    def _objects(self, prefix: str) -> Iterator[ObjectTypeDef]:
        with translated():
            pages = self._client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=prefix):
                yield from page.get("Contents", ())

    def _name(self, key: str) -> str:
        name = self._prefix + "/".join(parts_of(key))
        if len(name.encode()) > LONGEST_NAME:
            raise ValueError(f"not a storage key, too long for S3: {key!r}")
        return name

    def _client(self) -> S3Client:
        # One per process: a fork must not share its parent's connections.
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                with translated():
                    self._made = (os.getpid(), _connect())
            return self._made[1]


def _connect() -> S3Client:
    # boto3 itself knows AWS_DEFAULT_REGION only.
    region = os.environ.get("AWS_REGION") or None
    try:
        return boto3.session.Session(region_name=region).client("s3", config=CONFIG)
    except ValueError as error:
        # An endpoint that is no URL. Nothing may be lost by it: the operator mends it and starts again.
        raise StorageAway(f"S3 storage cannot be reached: {error}") from error


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
