"""What a run that is served shows of itself: whether it is stuck, idle, or overlooked. Pure.

Times are seconds of a monotonic clock, given by the caller, so that no clock that is set matters.
"""

from __future__ import annotations

from gpu_pool.control import Report
from gpu_pool.timing import Bell, Pulse
from workers.queue.records import Head


class Signs:
    """One run on one worker; to be told what was read each time that the server answered."""

    def __init__(self) -> None:
        """Knows nothing yet."""
        self._progress, self._activity, self._absence = Pulse(), Pulse(), Pulse()
        self._bell = Bell()
        self._report: Report | None = None
        # For how long the run has had nothing to do.
        self.idle_s = 0.0

    def hear(self, report: Report | None) -> None:
        """The worker's report; what it said last stands when it is silent."""
        self._report = report or self._report

    def absent_s(self, head: Head | None, now: float) -> float:
        """For how long the journal has been gone."""
        if head is not None:
            self._absence = Pulse()
            return 0.0
        return self._absence.silent_s("gone", now)

    def loading_s(self, now: float) -> float:
        """For how long a worker that loads the run has made no progress."""
        return self._progress.silent_s(self._report.progress if self._report else "", now)

    def stuck_s(self, head: Head, now: float) -> float:
        """For how long an operation that runs has made no progress; 0 when none runs."""
        progress = self._report.progress if self._report else ""
        if not head.busy or not progress:
            self._progress = Pulse()
            return 0.0
        return self._progress.silent_s(f"{head.running} {progress}", now)

    def watch_idleness(self, head: Head, now: float) -> None:
        """Keeps `idle_s` up to date."""
        if head.hold or head.waits or head.busy:
            self._activity, self.idle_s = Pulse(), 0.0
        else:
            self.idle_s = self._activity.silent_s(str(head.last_activity), now)

    def bell_is_due(self, head: Head, now: float) -> bool:
        """Whether to ring because the run has work and makes no progress."""
        return self._bell.due(head.applied, head.waits and not head.hold, head.busy, now)
