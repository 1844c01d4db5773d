"""Which weights a sample is from, and how to come by them."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from schemas.errors import SignalError
from workers.canonical import digest
from workers.engine import export
from workers.engine.lora import Adapter
from workers.engine.parameters import Weights
from workers.engine.state import mismatch
from workers.engine.trainer import Trainer
from workers.session.artifacts import read_verified
from workers.session.tensor_file import read_tensors
from workers.session.training import lora_spec
from workers.storage import Storage

# Saved states that stay in memory, the last used.
KEPT = 4


@dataclass(frozen=True)
class Source:
    """Weights, None for the bare base; how the answer names them; the steps behind them."""

    weights: Weights | None
    shown: dict[str, Any]
    step: int | None


class Sources:
    """The weights that one run's samples are from."""

    def __init__(self, trainer: Trainer, storage: Storage) -> None:
        """Saved states are read from `storage` when they are first asked for."""
        self._trainer, self._storage = trainer, storage
        self._saved: OrderedDict[str, tuple[Weights, int]] = OrderedDict()

    def find(self, wanted: dict[str, Any]) -> Source:
        """What a request asks for. Raises SignalError not_found or state_mismatch."""
        shown = {name: wanted.get(name) for name in ("source", "run_id", "artifact")}
        if wanted["source"] == "base":
            return Source(None, shown, None)
        if wanted["source"] == "saved":
            weights, step = self._find_saved(wanted)
            return Source(weights, shown, step)
        adapter = self._trainer.adapter
        # A copy of a whole model would be as large as the model: its samples end before it is trained on.
        live = adapter.frozen() if isinstance(adapter, Adapter) else adapter
        return Source(live, shown, self._trainer.step)

    def _find_saved(self, wanted: dict[str, Any]) -> tuple[Weights, int]:
        name = wanted["sha256"]
        if name not in self._saved:
            self._saved[name] = self._read(wanted)
            while len(self._saved) > KEPT:
                self._saved.popitem(last=False)
        self._saved.move_to_end(name)
        return self._saved[name]

    def _read(self, wanted: dict[str, Any]) -> tuple[Weights, int]:
        manifest, files = read_verified(self._storage, wanted["key"])
        if digest(manifest) != wanted["sha256"]:
            raise mismatch("another one was saved under its name meanwhile")
        adapter = Adapter(lora_spec(manifest["config"]), self._trainer.base.decoder.layers)
        names = export.file_names(adapter)
        if missing := [one for one in names if one not in files]:
            raise mismatch(f"it has no {missing[0]}")
        tensors = read_tensors(files[names[1]])[0]
        weights = export.import_adapter(adapter, json.loads(files[names[0]]), tensors)
        adapter.master.copy_(weights)
        adapter.renew()
        return adapter.frozen(), int(manifest["step"])


def refused_source(error: SignalError) -> SignalError:
    """The same, said of the request's field."""
    return SignalError(error.code, error.message, param="weights")
