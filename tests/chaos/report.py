"""What the kills came to: a table for people, and .cache/chaos/report.json for programs."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.strikes import Strike

FILE = Path(".cache/chaos/report.json")


@dataclass
class Report:
    """All strikes of a session, and whether their runs came out equal."""

    seed: int
    strikes: list[tuple[Strike, bool]] = field(default_factory=list)
    other: dict[str, Any] = field(default_factory=dict)

    def add(self, strikes: Sequence[Strike], equal: bool) -> None:
        """The strikes of one run."""
        self.strikes += [(strike, equal) for strike in strikes if strike.hit]

    def note(self, name: str, value: Any) -> None:
        """A figure of another part."""
        self.other[name] = value

    def rows(self) -> list[dict[str, Any]]:
        """Kills by victim."""
        by_victim: dict[str, list[tuple[Strike, bool]]] = defaultdict(list)
        for strike, equal in self.strikes:
            if strike.killed_at is not None:
                by_victim[strike.victim].append((strike, equal))
        return [_row(victim, found) for victim, found in sorted(by_victim.items())]

    def write(self) -> None:
        """The whole of it as JSON."""
        FILE.parent.mkdir(parents=True, exist_ok=True)
        each = [
            {"strike": s.name, "equal": equal, "back_s": s.back_s, "note": s.note}
            for s, equal in self.strikes
        ]
        machine = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
        found = {"seed": self.seed, "machine": machine, "by_victim": self.rows(), "strikes": each}
        FILE.write_text(json.dumps(found | {"other": self.other}, indent=1) + "\n")

    def lines(self) -> list[str]:
        """The table."""
        rows = self.rows()
        names = f"{'killed':<16}{'kills':>6}{'equal':>7}{'back p50':>10}{'max':>8}"
        body = [
            f"{row['victim']:<16}{row['kills']:>6}{row['equal']:>7}"
            f"{_shown(row['back_s_p50']):>10}{_shown(row['back_s_max']):>8}"
            for row in rows
        ]
        head = f"{names}  (seconds from the kill to the next committed operation)"
        return [head, *body] if rows else []


def _row(victim: str, found: list[tuple[Strike, bool]]) -> dict[str, Any]:
    ranked = sorted(strike.back_s for strike, _ in found if strike.back_s is not None)
    return {
        "victim": victim,
        "kills": len(found),
        "equal": sum(equal for _, equal in found),
        "back_s_p50": ranked[len(ranked) // 2] if ranked else None,
        "back_s_max": ranked[-1] if ranked else None,
    }


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
