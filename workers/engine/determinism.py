"""Whether the same operations give the same bits, and what is set on a GPU so that more of them do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What cuBLAS needs to sum in one order; read when its first handle is made.
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_VALUE = ":4096:8"


def settle_cuda() -> None:
    """For the whole process: deterministic kernels wherever there are any, no TF32, no trying out of kernels.

    Must run before the first product on the device. Kernels that have no deterministic form go on, with
    a warning.
    """
    os.environ.setdefault(CUBLAS, _CUBLAS_VALUE)
    # Not torch.use_deterministic_algorithms: for a flag of torch.compile, which is not used here, it imports
    # torch._inductor, one second of a worker's start.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads memory that it has not written; filling it all would only cost time.
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False


@contextmanager
def unsorted_writes() -> Iterator[None]:
    """Inside, writes by index are not sorted first: all go to places of their own, in whatever order."""
    strict = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch._C._set_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(strict, warn_only=warn)


def why_not(device: torch.device) -> str | None:
    """Why bits may differ between two runs of the same operations, or None when they may not."""
    if device.type != "cuda":
        return None
    if not torch.are_deterministic_algorithms_enabled():
        return "torch's deterministic algorithms are off in this process"
    if os.environ.get(CUBLAS) not in (_CUBLAS_VALUE, ":16:8"):
        return f"{CUBLAS}={os.environ.get(CUBLAS)} lets cuBLAS sum in any order"
    # torch uses the deterministic form only where it may raise errors, which the engine does not ask for.
    return "the fused attention kernels sum gradients in an order that varies"
