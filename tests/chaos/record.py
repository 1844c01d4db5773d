"""Records a history: `python -m tests.chaos.record [NAME]`, into tests/chaos/histories/NAME.

A history is what a run leaves in storage (its sealed journal, one snapshot), the model it was trained on, and
what it answered. It is recorded once per version and never changed: every later version must read it, and
must come to the same order, kinds, statuses and numbers.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.chaos.course import SEED, course, essence
from tests.chaos.harness import Chaos, chaos_stack
from tests.support.api import Run
from tests.support.inside import until
from tests.support.tiny import make_tiny_model
from web.version import VERSION
from workers.queue.segments import Segments
from workers.storage import LocalStorage

HISTORIES = Path(__file__).with_name("histories")
CONFIG = {"base_model": "tiny", "lora_r": 2, "seed": SEED}
STEPS = 20


def main() -> None:
    """See above."""
    name = sys.argv[1] if len(sys.argv) > 1 else f"v{VERSION}"
    folder = HISTORIES / name
    if folder.exists():
        raise SystemExit(f"{folder} is there already; a history is never changed")
    with tempfile.TemporaryDirectory(prefix="signal-record-") as work:
        model = make_tiny_model(Path(work) / "model", hidden=16, layers=1, heads=2, kv_heads=1)
        with chaos_stack(Path(work), model, devices="cpu:1x1") as chaos:
            aside = Path(work) / "history"
            told = live(chaos, aside)
            shutil.copytree(model, aside / "model")
        (aside / "history.json").write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
        shutil.copytree(aside, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {len(told['operations'])} operations, {size // 1024} KB")


def live(chaos: Chaos, aside: Path) -> dict[str, Any]:
    """A whole life of a run; what it answered."""
    run = Run(chaos.api, chaos.api.create(**CONFIG))
    chaos.await_status(run, "ready")
    operations = course(STEPS)
    results = chaos.train(run, operations=operations)
    snapshots = chaos.stack.data_dir / "store" / "runs" / run.id / "snapshots"
    # Not the newest: something must be left to replay.
    found = until(lambda: sorted(path.parent for path in snapshots.glob("*/manifest.json"))[-2:])
    shutil.copytree(found[0], aside / "runs" / run.id / "snapshots" / found[0].name)
    certificate = chaos.certificate(run)
    config = run.get().json()["config"]
    run.ok("/complete", {"save": False})
    rows = run.get("/operations", params={"limit": 1000}).json()["data"]
    copy_sealed(chaos, run, len(rows), aside)
    return {
        "version": VERSION,
        "run_id": run.id,
        "config": config,
        "operations": [
            {
                "seq": row["seq"], "kind": row["kind"], "status": row["status"],
                "result": essence(results[at]) if at < len(results) else None,
            }
            for at, row in enumerate(rows)
        ],
        "certificate": certificate,
    }  # fmt: skip


def copy_sealed(chaos: Chaos, run: Run, last: int, aside: Path) -> None:
    """The journal, once all of it is in storage."""
    store = chaos.stack.data_dir / "store"

    def sealed() -> bool:
        found = Segments(LocalStorage(store)).between(run.id, 0, last)
        return [past.seq for past in found] == list(range(1, last + 1))

    until(sealed)
    journal = Path("runs") / run.id / "journal"
    shutil.copytree(store / journal, aside / journal)


if __name__ == "__main__":
    main()
