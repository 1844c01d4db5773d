"""Many requests at once, over plain sockets, so that the load itself costs the machine little. No SDK.

A request that is answered 429 or 503 with `Retry-After` is repeated after that time under the same
`Idempotency-Key`, as any client does; everything else that is not a success is kept as a finding.
"""

from __future__ import annotations

import http.client
import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 120.0
GIVE_UP_S = 600.0
RETRIED = (429, 503)


@dataclass
class Tally:
    """What many requests came to."""

    statuses: Counter[str] = field(default_factory=Counter)
    # 5xx that are neither 503 nor retryable by a header, 429 and 503 without Retry-After, and the like.
    findings: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    given_up: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def report(self) -> dict[str, Any]:
        """The figures, without the answers."""
        ranked = sorted(self.seconds) or [0.0]
        return {
            "statuses": dict(sorted(self.statuses.items())),
            "findings": dict(self.findings),
            "given_up": self.given_up,
            "request_s": {
                "p50": round(ranked[len(ranked) // 2], 3),
                "p95": round(ranked[min(len(ranked) - 1, len(ranked) * 95 // 100)], 3),
                "max": round(ranked[-1], 3),
            },
        }


class Client:
    """One keep-alive connection with a user's key."""

    def __init__(self, base_url: str, api_key: str) -> None:
        parts = urlsplit(base_url)
        self._where = (parts.hostname or "", parts.port or 80)
        self._headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
        self._connection: http.client.HTTPConnection | None = None

    def request(
        self, method: str, path: str, body: bytes | None = None, key: str | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in lower case, body. Raises OSError or HTTPException."""
        if self._connection is None:
            self._connection = http.client.HTTPConnection(*self._where, timeout=TIMEOUT_S)
        headers = self._headers | ({"Idempotency-Key": key} if key else {})
        try:
            self._connection.request(method, path, body, headers)
            answer = self._connection.getresponse()
            content = answer.read()
        except BaseException:
            self.close()
            raise
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, found, content

    def close(self) -> None:
        """Hang up."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def insist(client: Client, tally: Tally, method: str, path: str, body: bytes | None) -> Any:
    """One request until it is accepted; its JSON, or None when it was refused for good."""
    key, give_up = secrets.token_hex(12), time.monotonic() + GIVE_UP_S
    while time.monotonic() < give_up:
        begun = time.monotonic()
        try:
            status, headers, content = client.request(method, path, body, key)
        except (OSError, http.client.HTTPException) as error:
            with tally.lock:
                tally.statuses[f"{type(error).__name__}"] += 1
                tally.findings[f"{method} {path.split('?')[0]}: {error!r}"[:200]] += 1
            time.sleep(0.2)
            continue
        waits = headers.get("retry-after")
        with tally.lock:
            tally.seconds.append(time.monotonic() - begun)
            tally.statuses[_named(status, content)] += 1
            if status >= 400 and (status not in RETRIED or waits is None):
                tally.findings[f"{status}: {content[:160].decode(errors='replace')}"] += 1
        if status < 400:
            return json.loads(content)
        if status not in RETRIED and status < 500:
            return None
        time.sleep(float(waits or 1))
    with tally.lock:
        tally.given_up += 1
    return None


def _named(status: int, content: bytes) -> str:
    """The status, with the error's code where there is one."""
    if status < 400:
        return str(status)
    try:
        return f"{status} {json.loads(content)['error']['code']}"
    except (ValueError, KeyError, TypeError):
        return str(status)


def together(jobs: Sequence[Callable[[], Any]], tally: Tally) -> float:
    """Runs all at once, each on a thread of its own; their answers go to the tally. The seconds it took."""
    gate = threading.Barrier(len(jobs) + 1)

    def one(job: Callable[[], Any]) -> None:
        gate.wait()
        answer = job()
        with tally.lock:
            tally.answers.append(answer)

    threads = [threading.Thread(target=one, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    gate.wait()
    begun = time.monotonic()
    for thread in threads:
        thread.join()
    return time.monotonic() - begun


def collect(
    client: Client, ids: Sequence[str], tally: Tally, timeout_s: float
) -> tuple[Counter[str], float]:
    """Waits for futures; how many ended in which status ("lost" among them), and the seconds it took."""
    found: Counter[str] = Counter()
    left, begun = list(ids), time.monotonic()
    while left and time.monotonic() - begun < timeout_s:
        part = left[:100]
        rows = insist(client, tally, "GET", f"/futures?ids={','.join(part)}&wait=20", None)
        over = {
            row["future_id"]: row["status"]
            for row in (rows or {"data": []})["data"]
            if row["status"] in ("completed", "failed", "cancelled")
        }
        found.update(over.values())
        # Those of the front that are not over are asked for again, behind nobody: order is by age.
        left = [one for one in part if one not in over] + left[100:]
    found["lost"] += len(left)
    return found, time.monotonic() - begun
