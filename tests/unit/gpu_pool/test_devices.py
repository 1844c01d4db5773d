"""The devices of a host: what operators may ask for, and what NVML's answers become."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from gpu_pool import devices
from gpu_pool.devices import DeviceSpec, discover, parse

GIB = 1024**3


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("auto", DeviceSpec("auto")),
        ("cuda", DeviceSpec("cuda")),
        ("cpu:2", DeviceSpec("cpu", 2)),
        ("cpu:12x3", DeviceSpec("cpu", 12, 3)),
    ],
)
def test_parse(spec: str, expected: DeviceSpec) -> None:
    assert parse(spec) == expected


@pytest.mark.parametrize(
    "spec", ["", "cpu", "cpu:", "cpu:0", "cpu:2x0", "cpu:-1", "cpu:2x", "gpu", "cpu:2x1 ", "CPU:2"]
)
def test_parse_says_what_is_allowed(spec: str) -> None:
    with pytest.raises(ValueError, match=r"cpu:SLOTSxTHREADS") as caught:
        parse(spec)
    assert repr(spec) in str(caught.value)


def test_cpu_slots_share_the_machine() -> None:
    slots = discover("cpu:3x2")
    assert [slot.name for slot in slots] == ["cpu0", "cpu1", "cpu2"]
    assert {(slot.kind, slot.threads, slot.uuid) for slot in slots} == {("cpu", 2, None)}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert sum(slot.memory_bytes for slot in slots) == pytest.approx(memory, rel=1e-6)


@pytest.mark.parametrize(
    ("cores", "slots", "threads"), [(1, 2, 1), (2, 2, 1), (8, 2, 4), (64, 16, 4)]
)
def test_the_cores_decide_when_nobody_says(
    monkeypatch: pytest.MonkeyPatch, cores: int, slots: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    found = devices.cpu_slots(0, 0)
    assert len(found) == slots
    assert {slot.threads for slot in found} == {threads}


def test_a_cpu_worker_sees_no_gpu() -> None:
    (slot,) = discover("cpu:1x2")
    pinned = slot.environment()
    assert pinned["CUDA_VISIBLE_DEVICES"] == ""
    assert pinned["OMP_NUM_THREADS"] == "2"
    device = slot.for_run("h")
    assert device.pop("name")
    assert device == {"host": "h", "slot": "cpu0", "kind": "cpu", "threads": 2}


class Nvml:
    """NVML as it answers on a host with a whole GPU and one that is split into two instances."""

    whole: Mapping[str, Any] = {"uuid": "GPU-aaaa1111", "memory": 80 * GIB, "mig": None}
    split: Mapping[str, Any] = {
        "uuid": "GPU-bbbb2222",
        "memory": 80 * GIB,
        "mig": [
            {"uuid": "MIG-1", "memory": 10 * GIB},
            None,
            {"uuid": "MIG-2", "memory": 20 * GIB},
        ],
    }

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in dir(self):
            if name.startswith("nvml"):
                monkeypatch.setattr(pynvml, name, getattr(self, name))
        monkeypatch.setattr(devices, "version", lambda _name: "2.13.0+cu130")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Mapping[str, Any]:
        return (self.whole, self.split)[index]

    def nvmlDeviceGetUUID(self, handle: Mapping[str, Any]) -> str:
        return str(handle["uuid"])

    def nvmlDeviceGetName(self, handle: Mapping[str, Any]) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetMemoryInfo(self, handle: Mapping[str, Any]) -> SimpleNamespace:
        return SimpleNamespace(total=handle["memory"])

    def nvmlDeviceGetMigMode(self, handle: Mapping[str, Any]) -> tuple[int, int]:
        if handle["mig"] is None:
            raise pynvml.NVMLError_NotSupported
        return 1, 1

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Mapping[str, Any]) -> int:
        return len(handle["mig"])

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Mapping[str, Any], number: int) -> Any:
        if handle["mig"][number] is None:
            raise pynvml.NVMLError_NotFound
        return handle["mig"][number]


def test_gpus_are_slots_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    Nvml().install(monkeypatch)
    slots = discover("auto")
    assert [(slot.name, slot.uuid, slot.memory_bytes // GIB) for slot in slots] == [
        ("gpu0", "GPU-aaaa1111", 80),
        ("gpu1-mig0", "MIG-1", 10),
        ("gpu1-mig1", "MIG-2", 20),
    ]
    assert slots[0].environment()["CUDA_VISIBLE_DEVICES"] == "GPU-aaaa1111"
    assert slots[0].for_run("h")["uuids"] == ["GPU-aaaa1111"]


@pytest.mark.parametrize(
    ("visible", "names"),
    [("0", ["gpu0"]), ("GPU-bbbb", ["gpu1-mig0", "gpu1-mig1"]), ("", []), ("7", [])],
)
def test_gpus_that_are_hidden_from_us_stay_hidden(
    monkeypatch: pytest.MonkeyPatch, visible: str, names: list[str]
) -> None:
    Nvml().install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [slot.name for slot in devices.gpu_slots()] == names


def test_auto_leaves_gpus_to_a_torch_that_can_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    Nvml().install(monkeypatch)
    monkeypatch.setattr(devices, "version", lambda _name: "2.13.0+cpu")
    assert {slot.kind for slot in discover("auto")} == {"cpu"}


def test_without_a_driver_there_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert {slot.kind for slot in discover("auto")} == {"cpu"}
    with pytest.raises(ValueError, match="no NVIDIA driver"):
        discover("cuda")
