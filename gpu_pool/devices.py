"""Devices of this host, as slots that one worker each can be pinned to.

Reads NVML (nvidia-ml-py) where an NVIDIA driver answers, else the CPU. Never imports torch: CUDA in
the agent would take GPU memory.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pynvml

_CPU = re.compile(r"cpu:(?P<slots>[0-9]{1,4})(x(?P<threads>[0-9]{1,4}))?")
_HELP = 'devices must be "auto", "cuda", or "cpu:SLOTS" or "cpu:SLOTSxTHREADS" such as cpu:2x1'


@dataclass(frozen=True)
class DeviceSpec:
    """What the operator asked for; 0 slots or threads means that the machine decides."""

    kind: str
    slots: int = 0
    threads: int = 0


@dataclass(frozen=True)
class Slot:
    """One place for a worker: a GPU or MIG instance by UUID, or a number of CPU threads."""

    name: str
    kind: str
    device_name: str
    memory_bytes: int
    threads: int
    uuid: str | None = None

    def environment(self) -> dict[str, str]:
        """What pins a worker to this slot; it must be set before the worker imports torch."""
        pinned = {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            # Empty hides every GPU; a UUID cannot mean another GPU after a reboot, as an index can.
            "CUDA_VISIBLE_DEVICES": self.uuid or "",
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
        }
        if self.uuid:
            # cuBLAS is deterministic only with a fixed workspace, and reads this when CUDA starts.
            pinned["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        return pinned

    def for_run(self, host: str) -> dict[str, Any]:
        """The device as a run's worker and its owner are told of it."""
        device = {"host": host, "slot": self.name, "kind": self.kind, "name": self.device_name}
        return device | ({"uuids": [self.uuid]} if self.uuid else {"threads": self.threads})


def parse(spec: str) -> DeviceSpec:
    """Reads SIGNAL_DEVICES. Raises ValueError that says what is allowed."""
    if spec in ("auto", "cuda"):
        return DeviceSpec(spec)
    match = _CPU.fullmatch(spec)
    if match is None:
        raise ValueError(f"{_HELP}; not {spec!r}")
    slots, threads = int(match["slots"]), int(match["threads"] or 0)
    if slots < 1 or (match["threads"] and threads < 1):
        raise ValueError(f"{_HELP}, with at least one slot and one thread; not {spec!r}")
    return DeviceSpec("cpu", slots, threads)


def discover(spec: str) -> list[Slot]:
    """The slots that `spec` asks for. Raises ValueError where this machine cannot give them."""
    wanted = parse(spec)
    if wanted.kind == "cpu":
        return cpu_slots(wanted.slots, wanted.threads)
    gpus = gpu_slots()
    if wanted.kind == "cuda" and not gpus:
        raise ValueError('devices is "cuda", but no NVIDIA driver shows a GPU; use "cpu:SLOTS"')
    if wanted.kind == "auto" and not _torch_can_use_gpus():
        gpus = []
    return gpus or cpu_slots(0, 0)


def cpu_slots(slots: int, threads: int) -> list[Slot]:
    """CPU slots that share the cores and the memory evenly; 0 lets the number of cores decide."""
    cores = len(os.sched_getaffinity(0))
    slots = slots or max(2, cores // 4)
    threads = threads or max(1, cores // slots)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // slots
    model = _cpu_model()
    return [Slot(f"cpu{number}", "cpu", model, memory, threads) for number in range(slots)]


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def gpu_slots() -> list[Slot]:
    """A slot per GPU, or per MIG instance where a GPU is partitioned; none without a driver."""
    with _nvml() as present:
        if not present:
            return []
        found = list(_visible_devices())
    threads = max(1, len(os.sched_getaffinity(0)) // max(1, len(found)))
    return [Slot(name, "cuda", model, memory, threads, uuid) for name, model, memory, uuid in found]


@contextmanager
def _nvml() -> Iterator[bool]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, or one that does not work: the CPU path
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


def _visible_devices() -> Iterator[tuple[str, str, int, str]]:
    """(slot name, model, bytes, UUID) of every whole GPU and MIG instance."""
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        if not allowed(index, pynvml.nvmlDeviceGetUUID(handle), os.environ):
            continue
        instances = list(_mig_instances(handle))
        if not instances:
            yield f"gpu{index}", *_facts(handle)
        for number, instance in enumerate(instances):
            yield f"gpu{index}-mig{number}", *_facts(instance)


def allowed(index: int, uuid: str, env: Mapping[str, str]) -> bool:
    """False for a GPU that a CUDA_VISIBLE_DEVICES of ours, set by Slurm for example, leaves out."""
    listed = env.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return True
    entries = [entry.strip() for entry in listed.split(",")]
    # As CUDA reads it: an index, or the beginning of a UUID.
    return str(index) in entries or any(
        uuid.startswith(entry) for entry in entries if entry.startswith("GPU-")
    )


def _mig_instances(handle: Any) -> Iterator[Any]:
    try:
        current, _pending = pynvml.nvmlDeviceGetMigMode(handle)
        slots = pynvml.nvmlDeviceGetMaxMigDeviceCount(handle) if current else 0
    except pynvml.NVMLError_NotSupported:
        return
    for number in range(slots):
        try:
            yield pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except pynvml.NVMLError_NotFound:
            continue


def _facts(handle: Any) -> tuple[str, int, str]:
    memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    return pynvml.nvmlDeviceGetName(handle), memory, pynvml.nvmlDeviceGetUUID(handle)


def _torch_can_use_gpus() -> bool:
    """False when the installed torch is a CPU build, which its metadata tells."""
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return True
