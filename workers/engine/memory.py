"""How much memory a pass may take, and what an error says of it having been too much."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

# Tokens of one micro-batch at most: beyond, products gain nothing and only memory grows.
_MOST_TOKENS = {"cpu": 4096, "cuda": 32768}
_FEWEST_TOKENS = 64
# Of the free memory, what a pass may use: the rest is for fragments and for others on the machine.
_SHARE = 0.7


@dataclass
class Budget:
    """The tokens of one micro-batch, from what a token was measured to take on this base.

    `bytes_per_token` are the activations that a backward pass keeps, without and with recomputation of
    layers; an estimate until passes have been measured.
    """

    device: torch.device
    bytes_per_token: dict[bool, float]
    # Lowered by an out-of-memory error, for the operations after it.
    ceiling: int = 1 << 62

    def tokens(self, checkpoint: bool) -> int:
        """How many tokens fit now."""
        fit = int(_SHARE * available_bytes(self.device) / self.bytes_per_token[checkpoint])
        most = _MOST_TOKENS.get(self.device.type, 4096)
        return max(_FEWEST_TOKENS, min(most, self.ceiling, fit))

    def overrun(self, tokens: int) -> None:
        """A pass of so many tokens ran out of memory."""
        self.ceiling = max(_FEWEST_TOKENS, tokens // 2)

    def measured(self, checkpoint: bool, tokens: int, taken: int) -> None:
        """A pass of so many tokens took so many bytes: the most per token counts from now on."""
        if tokens >= _FEWEST_TOKENS and taken > 0:
            per_token = taken / tokens
            # The estimate gives way to the first measurement, an earlier one only to a larger.
            if checkpoint in self._seen:
                per_token = max(per_token, self.bytes_per_token[checkpoint])
            self._seen.add(checkpoint)
            self.bytes_per_token[checkpoint] = per_token

    def __post_init__(self) -> None:
        self._seen: set[bool] = set()


class Peak:
    """The memory that a device needed above what it held at the beginning; 0 on a CPU, which is estimated."""

    def __init__(self, device: torch.device) -> None:
        """Begins now."""
        self._device, self._begin = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._begin = torch.cuda.memory_allocated(device)

    def taken(self) -> int:
        """Bytes so far."""
        if self._device.type != "cuda":
            return 0
        return torch.cuda.max_memory_allocated(self._device) - self._begin


def available_bytes(device: torch.device) -> int:
    """What may still be allocated: the device's free memory, on a CPU the host's and the control group's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    return min(_host_available(), _group_available())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, as Python, torch's CPU or CUDA allocator say it."""
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in text or "out of memory" in text)
    )


def release_freed() -> None:
    """Give freed memory back to the system: what converting weights took, glibc would keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _host_available() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = next(line for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 1 << 62
    return int(found.split()[1]) * 1024


def _group_available() -> int:
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            used = int(file.read())
    except (OSError, ValueError):
        return 1 << 62
    return 1 << 62 if limit == "max" else max(0, int(limit) - used)


def layer_bytes(hidden: int, inner: int, heads: int, itemsize: int) -> float:
    """Bytes per token that one layer of ours keeps: inputs of the adapters, norms, attention, gate and up.

    `hidden`, `inner` and `heads` are widths; the norms keep float32.
    """
    return itemsize * (3.0 * hidden + 3 * inner + 4 * heads) + 4.0 * 2 * hidden
