"""`make bench-storm`: far more at once than anybody asks for, on one machine, against a budget, as JSON.

Five parts: 64 bodies of 500 KB at once, 208 of 3.3 MB, 512 samples at once, the first part again, and 10,000
operations queued on one run. Nothing accepted may be lost, nothing may be answered 5xx but 503 (and 429)
with `Retry-After`; a second client that asks for a run's state ten times a second meanwhile gets its
answers within the budget; and what the server's processes hold afterwards is what they held before.
Ends with status 1 when the budget is not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench import memory
from tests.bench.heartbeat import Beats, beating
from tests.bench.load import Client, Tally, collect, insist, together
from tests.bench.timing import running, say
from tests.support.stack import RunningStack
from tests.support.tiny import make_tiny_model

HEARTBEAT_P95_MS = 111.0
MEMORY_GROWTH_MB = 100.0
ROWS = 128
# A row's positions in JSON: a token, its target, and a weight as a trainer's floats are.
BYTES_PER_TOKEN = 33
PARTS = ("bodies_500k", "bodies_3300k", "samples", "bodies_500k_again", "queued")


def body_of(size: int) -> bytes:
    """A forward_backward request of about so many bytes, with the per-token weights of a policy loss."""
    chance = random.Random(size)
    length = max(2, size // BYTES_PER_TOKEN // ROWS)
    rows = [
        {
            "tokens": [chance.randrange(100, 250) for _ in range(length)],
            "targets": [chance.randrange(100, 250) for _ in range(length)],
            "weights": [chance.uniform(-1e-5, 1e-5) for _ in range(length)],
        }
        for _ in range(ROWS)
    ]
    return json.dumps({"batch_data": rows, "loss_fn": "cross_entropy"}).encode()


class Storm:
    """One stack under the storm."""

    def __init__(self, stack: RunningStack, beats: Beats, runs: list[str], share: float) -> None:
        """`share` of the full numbers is sent, for a quick look."""
        self.stack, self.beats, self.runs, self.share = stack, beats, runs, share
        self.client = self.a_client()

    def a_client(self) -> Client:
        """A connection of its own."""
        return Client(self.stack.base_url, self.stack.api_key)

    def count(self, full: int) -> int:
        """So many of the full number."""
        return max(1, round(full * self.share))

    def bodies_500k(self) -> dict[str, Any]:
        """64 bodies of 500 KB."""
        return self.bodies(self.count(64), 500_000)

    def bodies_3300k(self) -> dict[str, Any]:
        """208 bodies of 3.3 MB."""
        return self.bodies(self.count(208), 3_300_000)

    def bodies(self, count: int, size: int) -> dict[str, Any]:
        """So many large batches, spread over the runs, all sent at the same moment."""
        body = body_of(size)
        return self.flood("forward_backward_async", [body] * count) | {"body_bytes": len(body)}

    def samples(self) -> dict[str, Any]:
        """512 samples whose callers all wait for the answer itself."""
        body = json.dumps({"prompts": [[100, 101]], "max_tokens": 2, "stop": []}).encode()
        return self.flood("sample", [body] * self.count(512))

    def flood(self, verb: str, bodies: list[bytes]) -> dict[str, Any]:
        """All at once; then until every future has ended."""
        tally = Tally()
        jobs: list[Callable[[], Any]] = [
            partial(
                insist, self.a_client(), tally, "POST",
                f"/runs/{self.runs[at % len(self.runs)]}/{verb}", body,
            )
            for at, body in enumerate(bodies)
        ]  # fmt: skip
        self.beats.report()
        seconds = together(jobs, tally)
        beats = self.beats.report()
        answers = [one for one in tally.answers if one is not None]
        ids = [one["future_id"] for one in answers if "future_id" in one]
        ended, waited = collect(self.client, ids, tally, 600)
        ended["completed"] += len(answers) - len(ids)
        figures = self.figures(tally, len(bodies), ended, accepted_s=seconds, ended_s=waited)
        # While the load came in; what follows is only the worker's.
        return figures | {"heartbeat_ms": beats}

    def queued(self) -> dict[str, Any]:
        """10,000 operations on a run that has no device yet; then it gets one."""
        count, tally = self.count(10_000), Tally()
        run_id = self.create()
        step = {"kind": "forward_backward", "batch_data": [{"tokens": [100, 101, 102]}]}
        pair = [step, {"kind": "optim_step"}]
        ids, begun = [], time.monotonic()
        while len(ids) < count:
            body = json.dumps({"operations": (pair * 32)[: count - len(ids)]}).encode()
            answer = insist(self.client, tally, "POST", f"/runs/{run_id}/operations", body)
            if answer is None:
                break
            ids += [one["future_id"] for one in answer["data"]]
        accepted_s = time.monotonic() - begun
        refused = None
        if self.share == 1.0:
            sent = {name: value for name, value in step.items() if name != "kind"}
            body = json.dumps(sent).encode()
            path = f"/runs/{run_id}/forward_backward_async"
            status, headers, content = self.client.request("POST", path, body)
            code = json.loads(content).get("error", {}).get("code")
            refused = [status, code, headers.get("retry-after")]
            if refused[:2] != [429, "queue_full"] or refused[2] is None:
                tally.findings[f"one too many is answered {refused}"] += 1
        for run in self.runs:
            insist(self.client, Tally(), "POST", f"/runs/{run}/cancel", b"{}")
        self.runs = []
        ended, waited = collect(self.client, ids, tally, 900)
        insist(self.client, Tally(), "POST", f"/runs/{run_id}/cancel", b"{}")
        figures = self.figures(tally, count, ended, accepted_s=accepted_s, ended_s=waited)
        return figures | {"one_too_many": refused, "operations_per_s": round(count / waited, 1)}

    def create(self) -> str:
        """A run of the storm's model."""
        config = {"base_model": "storm", "lora_r": 2, "lora_target_modules": ["q_proj"]}
        answer = insist(self.client, Tally(), "POST", "/runs", json.dumps(config).encode())
        return str(answer["run_id"])

    def await_ready(self, run_id: str) -> None:
        """Until the run has its worker."""
        while insist(self.client, Tally(), "GET", f"/runs/{run_id}", None)["status"] != "ready":
            time.sleep(0.05)

    def figures(
        self, tally: Tally, sent: int, ended: dict[str, int], **seconds: float
    ) -> dict[str, Any]:
        """One part's row of the table."""
        lost = sent - ended.get("completed", 0)
        rounded = {name: round(value, 2) for name, value in seconds.items()}
        told = {"sent": sent, "lost": lost, "ended": dict(ended), **rounded, **tally.report()}
        return told | {"heartbeat_ms": self.beats.report()}


def measure(parts: tuple[str, ...], share: float) -> dict[str, Any]:
    """The table."""
    with tempfile.TemporaryDirectory(prefix="signal-storm-") as folder:
        model = make_tiny_model(
            Path(folder) / "storm", hidden=8, layers=1, vocab=260, heads=1, kv_heads=1
        )
        # One run to a device, so that another has to wait for its own.
        settings = {"SIGNAL_MAX_RUNS_PER_WORKER": "1"}
        with running("storm", model, "cpu:2x1", **settings) as (stack, client):
            watched = client.create_run("storm", lora_r=2, lora_target_modules=["q_proj"])
            path, file = f"/runs/{watched.run_id}", Path(folder) / "beats"
            with beating(stack.base_url, stack.api_key, path, file) as beats:
                storm = Storm(stack, beats, [watched.run_id], share)
                storm.runs.append(storm.create())
                for run_id in storm.runs:
                    storm.await_ready(run_id)
                return weather(storm, parts)


def weather(storm: Storm, parts: tuple[str, ...]) -> dict[str, Any]:
    """The parts in their order, and memory around them."""
    found: dict[str, Any] = {}
    # Once before anything is counted: what a first large body loads and allocates stays.
    storm.flood("forward_backward_async", [body_of(500_000)] * 8)
    storm.beats.report()
    held = {"before": memory.by_part(storm.stack)}
    for name in parts:
        say(f"  {name}")
        found[name] = getattr(storm, name.removesuffix("_again"))()
        held[name] = memory.by_part(storm.stack)
        say(f"    {json.dumps(found[name])}")
    held["after"] = memory.settled(storm.stack)
    found["memory_mb"] = held
    found["kept"] = verdict(found, parts)
    return found


def verdict(found: dict[str, Any], parts: tuple[str, ...]) -> dict[str, bool]:
    """The budget, line by line."""
    rows = [row for row in found.values() if isinstance(row, dict) and "lost" in row]
    memory_mb = found["memory_mb"]
    grown = memory_mb["after"]["web"] - memory_mb["before"]["web"]
    return {
        "nothing_lost": all(row["lost"] == 0 and row["given_up"] == 0 for row in rows),
        "no_5xx_but_503_with_retry_after": all(not row["findings"] for row in rows),
        "heartbeat_p95": all(row["heartbeat_ms"]["p95"] < HEARTBEAT_P95_MS for row in rows),
        "heartbeats_answered": all(row["heartbeat_ms"]["not_200"] == 0 for row in rows),
        "memory_flat": grown < MEMORY_GROWTH_MB,
    }


def main() -> None:
    """`python -m tests.bench.storm [--only PART …] [--share 0.1]`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--share", type=float, default=1.0, help="of the full numbers")
    args = parser.parse_args()
    machine = {"cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)}
    found = {"machine": machine} | measure(tuple(args.only or PARTS), args.share)
    json.dump(found, sys.stdout, indent=2)
    print()
    raise SystemExit(0 if all(found["kept"].values()) else 1)


if __name__ == "__main__":
    main()
