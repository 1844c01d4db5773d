"""What an S3 server and its library say, as the errors of the storage protocol.

Nearly all trouble is StorageAway: whoever holds a result that cannot be stored keeps it and tries again,
also while an operator mends a permission, a key or a bucket.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError
from urllib3.exceptions import HTTPError

from schemas.errors import SignalError
from workers.storage.protocol import StorageAway

_FULL = frozenset(
    (
        "InsufficientCapacity",
        "QuotaExceeded",
        "QuotaExceededException",
        "StorageFull",
        "TotalSizeLimitExceeded",
        "XMinioAdminBucketQuotaExceeded",
        "XMinioStorageFull",
    )
)
_INSUFFICIENT_STORAGE = 507
# Client errors of the moment, beside every refusal (401, 403, 407) and limit (408, 409, 429).
_AWAY = frozenset(
    (
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidToken",
        "NoSuchBucket",
        "OperationAborted",
        "RequestTimeout",
        "SlowDown",
        "TokenRefreshRequired",
    )
)
_AWAY_STATUS = frozenset((301, 307, 401, 403, 407, 408, 409, 429))


@contextmanager
def translated() -> Iterator[None]:
    """Raises StorageAway, SignalError storage_full or OSError for what S3's library raises."""
    try:
        yield
    except ClientError as error:
        raise _from_answer(error) from error
    except (StorageAway, ParamValidationError):
        raise
    except (BotoCoreError, HTTPError, ConnectionError, TimeoutError) as error:
        raise StorageAway(f"S3 storage cannot be reached: {error}") from error


def code_of(error: ClientError) -> str:
    """S3's name of the error; for answers without a body the status as text."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    """The HTTP status; 0 when unknown."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_missing(error: ClientError) -> bool:
    """Whether there is no such object (or, where the server does not tell them apart, no bucket)."""
    return code_of(error) in ("404", "NoSuchKey", "NotFound")


def is_taken(error: ClientError) -> bool:
    """Whether a conditional write found an object."""
    return status_of(error) == 412 or code_of(error) == "PreconditionFailed"


def _from_answer(error: ClientError) -> Exception:
    code, status = code_of(error), status_of(error)
    if code in _FULL or status == _INSUFFICIENT_STORAGE:
        return SignalError("storage_full", "The server's storage (S3) is full.")
    if code in _AWAY or status in _AWAY_STATUS or status >= 500:
        return StorageAway(f"S3 storage does not serve: {error}")
    if is_missing(error):
        return FileNotFoundError(errno.ENOENT, f"S3 storage has no such file: {error}")
    return OSError(errno.EPROTO, f"S3 storage refuses: {error}")
