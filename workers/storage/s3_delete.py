"""Deleting objects of an S3 bucket, and uploads that were begun and never finished."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from workers.storage.protocol import MANIFEST, StorageAway
from workers.storage.s3_errors import code_of, translated

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

AT_ONCE = 1000


def delete_folder(client: S3Client, bucket: str, base: str) -> None:
    """Delete the object `base` and everything under `base/`, manifests first."""
    with translated():
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=base + "/")
        names = [found["Key"] for page in pages for found in page.get("Contents", ())]
    delete_names(client, bucket, (name for name in names if name.endswith("/" + MANIFEST)))
    rest = (name for name in names if not name.endswith("/" + MANIFEST))
    delete_names(client, bucket, (base, *rest))
    _end_uploads(client, bucket, base)


def delete_names(client: S3Client, bucket: str, names: Iterable[str]) -> None:
    """Delete objects, a thousand by a request. Raises StorageAway when the server kept one."""
    left = iter(names)
    while batch := list(islice(left, AT_ONCE)):
        with translated():
            answer = client.delete_objects(
                Bucket=bucket,
                Delete={"Objects": [{"Key": name} for name in batch], "Quiet": True},
            )
        if failed := answer.get("Errors"):
            raise StorageAway(f"S3 storage did not delete {len(failed)} files: {failed[0]}")


def _end_uploads(client: S3Client, bucket: str, base: str) -> None:
    # They hold data, though no list of objects shows them.
    for name, upload in _uploads(client, bucket, base):
        with translated():
            try:
                client.abort_multipart_upload(Bucket=bucket, Key=name, UploadId=upload)
            except ClientError as error:
                if code_of(error) != "NoSuchUpload":
                    raise


def _uploads(client: S3Client, bucket: str, base: str) -> list[tuple[str, str]]:
    with translated():
        pages = client.get_paginator("list_multipart_uploads")
        try:
            found = [
                (one["Key"], one["UploadId"])
                for page in pages.paginate(Bucket=bucket, Prefix=base)
                for one in page.get("Uploads", ())
            ]
        except ClientError as error:
            if code_of(error) != "NotImplemented":
                raise
            return []
    return [one for one in found if one[0] == base or one[0].startswith(base + "/")]
