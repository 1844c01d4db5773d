"""Storing the files of one folder in S3, each only where nobody else has one.

S3 cannot rename, so two writers of one folder could mix their files. Every write is therefore conditional
(If-None-Match) and marked with its writer: a writer that meets another's file gives up, and one whose
answer was lost recognizes its own. Every body carries its MD5, which the server checks.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from workers.storage.s3_errors import code_of, is_missing, is_taken, status_of, translated

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

PART_BYTES = 8 << 20
MAX_PARTS = 10_000
PARALLEL = 4
ATTEMPTS = 4
PAUSE_S = 0.2
_MARK = "signal-writer"


class Uploader:
    """One writer's uploads; for one thread at a time."""

    def __init__(self, client: S3Client, bucket: str) -> None:
        """Each uploader is a writer of its own."""
        self._client, self._bucket = client, bucket
        self._writer = secrets.token_hex(12)
        self._condition: dict[str, Any] = {"IfNoneMatch": "*"}

    def put(self, name: str, path: Path) -> str:
        """Store a file as a new object; its ETag. Raises FileExistsError where another's is there."""
        with translated():
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    return self._send(name, path, self._condition)
                except ClientError as error:
                    if is_taken(error) or code_of(error) == "NoSuchUpload":
                        return self._own(name)
                    if attempt == ATTEMPTS or not self._worth_a_repeat(error):
                        raise
                time.sleep(PAUSE_S * attempt)
        raise AssertionError("unreachable")

    def replace(self, name: str, path: Path) -> str:
        """Store a file whatever is there; its ETag."""
        with translated():
            return self._send(name, path, {})

    def _worth_a_repeat(self, error: ClientError) -> bool:
        if self._condition and code_of(error) == "NotImplemented":
            # A server without conditional writes: what is left are the marks and the manifest.
            self._condition = {}
            return True
        # Somebody else is writing or deleting this very object.
        return status_of(error) == 409

    def _own(self, name: str) -> str:
        try:
            found = self._client.head_object(Bucket=self._bucket, Key=name)
        except ClientError as error:
            if not is_missing(error):
                raise
        else:
            if found["Metadata"].get(_MARK) == self._writer:
                return found["ETag"]
        raise FileExistsError(errno.EEXIST, "another writer has stored this file", name)

    def _send(self, name: str, path: Path, condition: dict[str, Any]) -> str:
        size = path.stat().st_size
        if size > PART_BYTES:
            return self._send_in_parts(name, path, size, condition)
        data = path.read_bytes()
        answer = self._client.put_object(
            Bucket=self._bucket, Key=name, Body=data, ContentMD5=md5_of(data),
            Metadata={_MARK: self._writer}, **condition,
        )  # fmt: skip
        return answer["ETag"]

    def _send_in_parts(self, name: str, path: Path, size: int, condition: dict[str, Any]) -> str:
        target: dict[str, Any] = {"Bucket": self._bucket, "Key": name}
        begun = self._client.create_multipart_upload(**target, Metadata={_MARK: self._writer})
        target["UploadId"] = begun["UploadId"]
        try:
            parts = self._send_parts(path, size, target)
            answer = self._client.complete_multipart_upload(
                **target, MultipartUpload={"Parts": parts}, **condition
            )
        except BaseException:
            self._abort(target)
            raise
        return answer["ETag"]

    def _send_parts(
        self, path: Path, size: int, target: dict[str, Any]
    ) -> list[CompletedPartTypeDef]:
        each = max(PART_BYTES, -(-size // MAX_PARTS))

        def send(number: int) -> CompletedPartTypeDef:
            with path.open("rb") as file:
                file.seek((number - 1) * each)
                data = file.read(each)
            answer = self._client.upload_part(
                **target, PartNumber=number, Body=data, ContentMD5=md5_of(data)
            )
            return {"PartNumber": number, "ETag": answer["ETag"]}

        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="s3") as pool:
            return list(pool.map(send, range(1, -(-size // each) + 1)))

    def _abort(self, target: dict[str, Any]) -> None:
        # Best effort: the first failure is what counts, and `delete` removes unfinished uploads too.
        try:
            self._client.abort_multipart_upload(**target)
        except Exception:
            return


def md5_of(data: bytes) -> str:
    """The value of the header Content-MD5."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
