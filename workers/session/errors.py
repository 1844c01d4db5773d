"""What an exception in an operation means, to the owner of the run and to the worker."""

from __future__ import annotations

import errno
import logging
import os

from schemas.errors import SignalError
from workers.exit_codes import DEVICE_BROKEN

log = logging.getLogger(__name__)


def as_signal_error(error: Exception) -> SignalError:
    """What the owner of a run is told of an error in an operation."""
    if isinstance(error, SignalError):
        return error
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or "OutOfMemory" in text or "can't allocate memory" in text:
        return SignalError("out_of_memory")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SignalError("storage_full")
    return SignalError(
        "operation_failed",
        f"The worker failed on this operation; the run is unchanged. {text}"[:2000],
    )


def leave_broken_device(error: Exception) -> None:
    """Ends the process where CUDA cannot be used any more: every later call would fail alike."""
    text = f"{type(error).__name__}: {error}"
    broken = "CUDA error" in text or "device-side assert" in text or "cuDNN error" in text
    if broken and "out of memory" not in text:
        log.critical("the device is unusable after %s", text)
        os._exit(DEVICE_BROKEN)
