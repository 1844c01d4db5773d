"""A process of its own in which file operations go wrong: `python -m tests.chaos.torn WHAT MODEL FOLDER`.

Runs with `interpose.c` preloaded. For every file operation of writing a snapshot (or of save_state), and for
every way in which it can go wrong, a fork writes until it is killed there or out of space; then this process
looks at what a loader finds. One JSON line per case: {"mode", "n", "found", "left", "again"}.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from workers.engine.adamw import AdamWSettings
from workers.engine.base import load_base
from workers.engine.certificate import certificate
from workers.engine.lora import LoraSpec
from workers.engine.state import TrainerState
from workers.engine.trainer import Trainer
from workers.session.artifacts import save_adapter
from workers.session.errors import as_signal_error
from workers.session.snapshots import Snapshots
from workers.storage import LocalStorage
from workers.storage.manifest import verify_file
from workers.text.rows import Row

RUN = "run_0123456789abcdef"
# As in interpose.c.
KILL_BEFORE, KILL_WITHIN, NO_SPACE = 1, 2, 3
MODES = {KILL_BEFORE: "killed before", KILL_WITHIN: "killed within", NO_SPACE: "no space"}
OLD_SEQ, NEW_SEQ = 1, 2


def make_trainer(model: str) -> Trainer:
    """One step taken, gradients accumulated: a state with all of its parts."""
    base = load_base(Path(model), dtype="float32", device="cpu", threads=1)
    lora = LoraSpec(r=4, alpha=32.0, target_modules=None, seed=7)
    trainer = Trainer(base, lora, AdamWSettings())
    advance(trainer)
    return trainer


def advance(trainer: Trainer) -> None:
    """To another state."""
    from array import array

    tokens = array("i", range(4, 20))
    rows = [Row(tokens, array("i", [*tokens[1:], 0]), array("f", [1.0] * 15 + [0.0]))]
    trainer.forward_backward(rows, "causal_lm", {}, True)
    trainer.optim_step()
    trainer.forward_backward(rows, "causal_lm", {}, True)


class SnapshotCase:
    """Writing the second snapshot of a run; what is found is the state of either."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.old = trainer.capture()
        advance(trainer)
        self.new = trainer.capture()
        self._names = {hashed(self.old): "old", hashed(self.new): "new"}

    def prepare(self, root: Path) -> None:
        """The first snapshot."""
        snapshots_in(root).write(self.old, facts(OLD_SEQ))

    def write(self, root: Path) -> None:
        """The second one."""
        snapshots_in(root).write(self.new, facts(NEW_SEQ))

    def found(self, root: Path) -> str:
        """What a loader takes for the newest state, every file verified."""
        loaded = snapshots_in(root).newest_good()
        if loaded is None:
            return "nothing"
        said = self._names.get(hashed(loaded.state), "neither")
        agrees = loaded.facts["seq"] == (NEW_SEQ if said == "new" else OLD_SEQ)
        return (
            said + (" and a damaged one" if loaded.damaged else "") + ("" if agrees else " mixed")
        )


class ArtifactCase:
    """save_state: what is found is nothing, or the whole artifact."""

    def __init__(self, trainer: Trainer, mode: str) -> None:
        self.trainer, self.mode = trainer, mode

    def prepare(self, root: Path) -> None:
        """Another artifact that must not suffer."""
        self._save(root, "before", OLD_SEQ)

    def write(self, root: Path) -> None:
        """The artifact."""
        self._save(root, "mine", NEW_SEQ)

    def found(self, root: Path) -> str:
        """By the manifest, every file verified."""
        storage = LocalStorage(root)
        for name in ("before", "mine"):
            key = f"runs/{RUN}/artifacts/{name}"
            manifest = storage.read(f"{key}/manifest.json")
            if manifest is None:
                return "old" if name == "mine" else "lost"
            for entry in json.loads(manifest)["files"]:
                verify_file(storage, key, entry)
        return "new"

    def _save(self, root: Path, name: str, seq: int) -> None:
        own = {"run_id": RUN, "seq": seq, "base_model": "tiny", "config": {"lora_r": 4}}
        save_adapter(LocalStorage(root), self.trainer, name, self.mode, own)


def snapshots_in(root: Path) -> Snapshots:
    """The run's snapshots as a process that just started sees them."""
    return Snapshots(LocalStorage(root), RUN)


def facts(seq: int) -> dict[str, Any]:
    """A snapshot's own."""
    return {"run_id": RUN, "seq": seq, "epoch": 1}


def hashed(state: TrainerState) -> str:
    """A state in one string."""
    return str(certificate(state)["sha256"])


def forked(act: Callable[[], None]) -> int:
    """Runs `act` in a fork; its wait status: 0 well, 256 storage_full, 512 any other error, 9 killed."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 2
    try:
        act()
        code = 0
    except Exception as error:
        code = 1 if as_signal_error(error).code == "storage_full" else 2
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def every_case(case: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """All operations in all modes."""
    chaos = ctypes.CDLL(None)
    template = folder / "template"
    case.prepare(template)
    total = _count(case, template, folder / "counted", chaos)
    for mode, name in MODES.items():
        for n in range(1, total + 1):
            root = folder / "case"
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(template, root)

            def act(root: Path = root, n: int = n, mode: int = mode) -> None:
                chaos.chaos_arm(n, mode)
                try:
                    case.write(root)
                finally:
                    chaos.chaos_arm(0, 0)

            status = forked(act)
            found = case.found(root)
            again = forked(lambda root=root: case.write(root))
            left = [path.name for path in (root / ".aside").rglob("*") if path.is_dir()]
            yield {
                "mode": name, "n": n, "of": total, "status": status, "found": found,
                "again": [again, case.found(root)], "left": left,
            }  # fmt: skip


def _count(case: Any, template: Path, root: Path, chaos: Any) -> int:
    shutil.copytree(template, root)
    out, into = os.pipe()

    def act() -> None:
        chaos.chaos_arm(-1, KILL_BEFORE)
        case.write(root)
        total = chaos.chaos_count()
        chaos.chaos_arm(0, 0)
        os.write(into, str(total).encode())

    assert forked(act) == 0
    return int(os.read(out, 20))


def main() -> None:
    """See above."""
    what, model, folder = sys.argv[1:]
    trainer = make_trainer(model)
    case = SnapshotCase(trainer) if what == "snapshot" else ArtifactCase(trainer, what)
    for line in every_case(case, Path(folder)):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
