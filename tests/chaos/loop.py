"""The researcher's loop that everything is done to: submits, looks at results, knows nothing of failures."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from rewardsignal import APIFuture, SignalRun

WINDOW = 8
# Longer than any outage that is caused here; a result that takes longer is a hang.
PATIENCE_S = 120.0


class Loop:
    """One run, trained from a thread with a window of operations under way."""

    def __init__(self, run: SignalRun, operations: Iterable[dict[str, Any]]) -> None:
        """`operations` is asked for the next one whenever there is room, so it sets the pace."""
        self.run, self._operations = run, operations
        self.results: list[dict[str, Any]] = []
        self._window: deque[APIFuture[Any]] = deque()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._guarded, name="loop", daemon=True)

    def start(self) -> Loop:
        """Begins; `join` waits for the end."""
        self._thread.start()
        return self

    def join(self, seconds: float = PATIENCE_S) -> list[dict[str, Any]]:
        """All results in order. Raises what the loop raised."""
        self._thread.join(seconds)
        if self._error is not None:
            raise self._error
        assert not self._thread.is_alive(), f"the loop stands still after {len(self.results)}"
        return self.results

    @property
    def over(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def _guarded(self) -> None:
        try:
            self._train()
        except BaseException as error:
            self._error = error

    def _train(self) -> None:
        for operation in self._operations:
            self._window.extend(self.run.submit([operation]))
            if len(self._window) >= WINDOW:
                self._look(self._window.popleft())
        while self._window:
            self._look(self._window.popleft())

    def _look(self, future: APIFuture[Any]) -> None:
        """An operation that fails is part of the course; whatever else is raised ends the loop."""
        error = future.exception(PATIENCE_S)
        if error is not None:
            self.results.append({"error": error.code})
        else:
            self.results.append(future.result().to_dict())


def paced(operations: Iterable[dict[str, Any]], before: Callable[[int], None]) -> Iterable[Any]:
    """The operations, each after `before(index)` has returned."""
    for index, operation in enumerate(operations):
        before(index)
        yield operation
