"""What the SDK costs: per call against a bare HTTP client, pipelined, and with thousands in flight. JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from rewardsignal import AsyncSignalClient, AsyncSignalRun, SignalClient, SignalRun, wait_all
from tests.bench.__main__ import machine
from tests.bench.timing import percentiles, running, say
from tests.bench.tiny import PAIRS, ROW, batched, one_by_one
from tests.support.connections import MostConnections
from tests.support.stack import RunningStack
from tests.support.tiny import make_tiny_model

IN_FLIGHT = 2000
BODIES: dict[str, dict[str, Any]] = {
    "forward_backward": {"batch_data": ROW, "loss_fn": "causal_lm"},
    "optim_step": {},
    "sample": {"prompts": ["a"], "max_tokens": 1},
}


def main() -> None:
    """`python -m tests.bench.sdk [--calls N] [--bursts N]`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=150, help="calls of each kind and client")
    parser.add_argument("--bursts", type=int, default=8, help=f"bursts of {PAIRS} pipelined pairs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="signal-bench-") as folder:
        model = make_tiny_model(Path(folder) / "tiny")
        with running("tiny", model, "cpu:1x1") as (stack, client):
            found = measure(stack, client, args.calls, args.bursts)
    json.dump({"machine": machine(), **found}, sys.stdout, indent=2)
    print()


def measure(stack: RunningStack, client: SignalClient, calls: int, bursts: int) -> dict[str, Any]:
    """All figures of one stack."""
    run = client.create_run("tiny", lora_r=8)
    for _ in range(20):
        run.forward_backward(ROW)
        run.optim_step()
    say("per call")
    found: dict[str, Any] = {"per_call": per_call(stack, run, calls)}
    found["per_call_in_an_event_loop"] = asyncio.run(per_call_async(stack, run.run_id, calls))
    say("pipelined")
    found["pipelined_steps_per_s"] = {
        "async_calls": speeds(bursts, lambda: one_by_one(run)),
        "pipeline": speeds(bursts, lambda: batched(run)),
        "event_loop": asyncio.run(speeds_async(stack, run.run_id, bursts)),
    }
    say(f"{IN_FLIGHT} in flight")
    found[f"{IN_FLIGHT}_futures"] = {
        "sync": in_flight(stack, lambda: many(run)),
        "event_loop": in_flight(stack, lambda: asyncio.run(many_async(stack, run.run_id))),
    }
    run.complete(save=False)
    return found


# One call after the other.


class Bare:
    """A request as somebody would send it who knows the body beforehand."""

    def __init__(self, stack: RunningStack, run_id: str) -> None:
        self.url = f"{stack.base_url}/runs/{run_id}/"
        self.headers = {
            "Authorization": f"Bearer {stack.api_key}",
            "Content-Type": "application/json",
        }
        self.bodies = {kind: json.dumps(body).encode() for kind, body in BODIES.items()}

    def arguments(self, kind: str) -> dict[str, Any]:
        """Of `post`."""
        headers = {**self.headers, "Idempotency-Key": uuid.uuid4().hex}
        return {"url": self.url + kind, "content": self.bodies[kind], "headers": headers}


def per_call(stack: RunningStack, run: SignalRun, times: int) -> dict[str, Any]:
    """Bare and by the SDK in turns, so that what the machine does else meets both."""
    bare = Bare(stack, run.run_id)
    sdk: dict[str, Callable[[], Any]] = {
        "forward_backward": lambda: run.forward_backward(ROW),
        "optim_step": run.optim_step,
        "sample": lambda: run.sample(["a"], max_tokens=1),
    }
    clocks = {(kind, who): Clock() for kind in sdk for who in ("bare", "sdk")}
    with httpx2.Client(timeout=60) as http:
        for _ in range(times):
            # Each step has the gradient of the forward_backward before it.
            for who in ("bare", "sdk"):
                for kind in sdk:
                    with clocks[kind, who].measured():
                        if who == "sdk":
                            sdk[kind]()
                        else:
                            answered(http.post(**bare.arguments(kind)))
    return compared(clocks)


async def per_call_async(stack: RunningStack, run_id: str, times: int) -> dict[str, Any]:
    """The same in an event loop, where the SDK's call is a place in the queue and a wait."""
    bare = Bare(stack, run_id)
    async with (
        AsyncSignalClient(stack.api_key, stack.base_url) as client,
        httpx2.AsyncClient(timeout=60) as http,
    ):
        run = await client.run(run_id)
        sdk: dict[str, Callable[[], Awaitable[Any]]] = {
            "forward_backward": lambda: run.forward_backward(ROW),
            "optim_step": run.optim_step,
            "sample": lambda: run.sample(["a"], max_tokens=1),
        }
        clocks = {(kind, who): Clock() for kind in sdk for who in ("bare", "sdk")}
        for _ in range(times):
            for who in ("bare", "sdk"):
                for kind in sdk:
                    with clocks[kind, who].measured():
                        if who == "sdk":
                            await sdk[kind]()
                        else:
                            answered(await http.post(**bare.arguments(kind)))
        return compared(clocks)


def answered(response: httpx2.Response) -> Any:
    """The answer as JSON; fails with what the server says."""
    assert response.status_code == 200, response.text
    return json.loads(response.content)


class Clock:
    """Milliseconds of wall time, and of this process's CPU."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Takes the time of the block."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.cpu.append((time.process_time() - cpu) * 1e3)
        self.wall.append((time.perf_counter() - wall) * 1e3)


def compared(clocks: dict[tuple[str, str], Clock]) -> dict[str, Any]:
    """Of each kind: both, and what the SDK adds to the median."""
    found: dict[str, Any] = {}
    for kind in BODIES:
        bare, sdk = clocks[kind, "bare"], clocks[kind, "sdk"]
        found[kind] = {
            f"{who}_{name}_ms": percentiles(values)
            for who, clock in (("bare", bare), ("sdk", sdk))
            for name, values in (("wall", clock.wall), ("cpu", clock.cpu))
        }
        for name, one, other in (("wall", bare.wall, sdk.wall), ("cpu", bare.cpu, sdk.cpu)):
            added = percentiles(other)["p50"] - percentiles(one)["p50"]
            found[kind][f"added_{name}_ms"] = round(added, 2)
    return found


# Many at once.


def speeds(bursts: int, burst: Callable[[], None]) -> dict[str, float]:
    """Pairs of forward_backward and optim_step per second."""
    found = []
    for _ in range(bursts):
        started = time.perf_counter()
        burst()
        found.append(PAIRS / (time.perf_counter() - started))
    return percentiles(found)


async def speeds_async(stack: RunningStack, run_id: str, bursts: int) -> dict[str, float]:
    """The same, each call awaited twice: for its place, and for its result."""
    found = []
    async with AsyncSignalClient(stack.api_key, stack.base_url) as client:
        run = await client.run(run_id)
        for _ in range(bursts):
            started = time.perf_counter()
            futures: list[Any] = []
            for _ in range(PAIRS):
                pair = run.forward_backward_async(ROW), run.optim_step_async()
                futures += await asyncio.gather(*pair)
            await asyncio.gather(*futures)
            found.append(PAIRS / (time.perf_counter() - started))
    return percentiles(found)


def many(run: SignalRun) -> None:
    """Submitted by as few requests as possible, and waited for."""
    operation = {"kind": "sample", "prompts": ["a"], "max_tokens": 1}
    wait_all(run.submit(operation for _ in range(IN_FLIGHT)), timeout=300)


async def many_async(stack: RunningStack, run_id: str) -> None:
    """As many calls, awaited together, and then their futures."""
    async with AsyncSignalClient(stack.api_key, stack.base_url) as client:
        run: AsyncSignalRun = await client.run(run_id)
        calls = (run.sample_async(["a"], max_tokens=1) for _ in range(IN_FLIGHT))
        await asyncio.gather(*await asyncio.gather(*calls))


def in_flight(stack: RunningStack, work: Callable[[], None]) -> dict[str, float]:
    """Seconds until all have ended, CPU seconds of this process, its connections."""
    with MostConnections(stack.base_url) as connections:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        found = {
            "seconds": round(time.perf_counter() - wall, 2),
            "client_cpu_s": round(time.process_time() - cpu, 2),
        }
    return {**found, "connections": connections.most}


if __name__ == "__main__":
    main()
