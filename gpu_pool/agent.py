"""The agent of a host: leases its slots to queued runs and runs their workers.

`python -P -m gpu_pool.agent`, one per data folder. A loop of small duties, each of which may fail
when SQL or Redis is away and is then done again in the next round; what must not wait for either,
the end of a process, is seen by a thread of its own. SIGTERM stops the workers and frees the slots.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from threading import Event
from types import FrameType

from kombu.exceptions import OperationalError as BrokerError
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError

from gpu_pool import leases
from gpu_pool.control import WorkerControl
from gpu_pool.database import Database
from gpu_pool.devices import Slot, discover
from gpu_pool.keeper import Phase, Pool, SlotKeeper
from gpu_pool.leases import Lease
from gpu_pool.listen import Listener
from gpu_pool.process import Process
from gpu_pool.registration import Registration
from gpu_pool.settlement import Settlements
from gpu_pool.state import StateFile, sole_agent
from gpu_pool.watch import Watcher
from gpu_pool.workers import Worker
from schemas.errors import SignalError
from workers.queue.app import make_app
from workers.queue.journal import Journal, connect
from workers.settings import Settings
from workers.storage import open_storage

log = logging.getLogger("gpu_pool.agent")

TICK_S = 0.5
POLL_S = 0.03
EAGER_ROUNDS = 6
SPARES = 2
STOP_S = 10.0

_AWAY = (RedisError, BrokerError, DBAPIError, OSError)


class Agent:
    """One host's slots, their keepers and the duties of the loop."""

    def __init__(self, settings: Settings, slots: list[Slot]) -> None:
        """Connects lazily: SQL and Redis may come up later than the agent."""
        self._settings = settings
        self._database = Database(settings.database_url)
        redis, app = connect(settings.redis_url, timeout_s=2.0), make_app(settings)
        self._journal = Journal(redis, open_storage(settings.data_dir), settings)
        control = WorkerControl(app, redis)
        self._settlements = Settlements(self._database, app, self._journal, control)
        self._registration = Registration(self._database, settings.host_name, slots)
        self._state = StateFile(settings.data_dir / "run")
        self._wake, self._stopping, self._eager = Event(), False, 0
        self._watcher = Watcher(self._on_exit)
        pool = Pool(
            settings, app, self._journal, control, self._watcher,
            self._settle, self._remember, self._settlements.forget,
        )  # fmt: skip
        self._keepers = {slot.name: SlotKeeper(slot, pool) for slot in slots}
        self._troubles: dict[str, str] = {}

    def stop(self) -> None:
        """Ends `run` after its present round. Only sets a flag, so a signal handler may call it."""
        self._stopping = True

    def run(self) -> None:
        """Serves until stopped."""
        self._end_leftovers()
        self._watcher.start()
        listener = Listener(self._settings.redis_url, self._wake.set)
        listener.start()
        while not self._stopping:
            self.round()
            self._rest()
        self._end()

    def _rest(self) -> None:
        """Until the next round: sooner while a worker is on its way, and soon again after a wake-up,
        because a run is announced a moment before it can be read in SQL."""
        in_transit = any(keeper.in_transit for keeper in self._keepers.values())
        if self._wake.wait(POLL_S if in_transit or self._eager else TICK_S):
            self._eager = EAGER_ROUNDS
        self._eager = max(0, self._eager - 1)
        self._wake.clear()

    def round(self) -> None:
        """Every duty once."""
        self._attempt("the host's renewal", self._renew)
        # Without Redis every other duty would wait for it in turn, and the host would seem lost.
        if not self._attempt("Redis", self._ping):
            return
        self._attempt("the end of leases", self._settlements.work)
        self._attempt("leasing", self._lease)
        for name, keeper in self._keepers.items():
            self._attempt(f"slot {name}", keeper.step)
        self._attempt("spare workers", self._start_spares)
        self._attempt("overdue operations", self._sweep)

    def _attempt(self, name: str, duty: Callable[[], None]) -> bool:
        """Does a duty; a failure is logged once, and the duty is due again in the next round."""
        try:
            duty()
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
            if self._troubles.get(name) != trouble:
                expected = isinstance(error, _AWAY)
                log.warning("%s: must wait, %s", name, trouble, exc_info=not expected)
            self._troubles[name] = trouble
            return False
        if self._troubles.pop(name, None):
            log.info("%s: again in order", name)
        return True

    # --- duties -------------------------------------------------------------------------------

    def _renew(self) -> None:
        """The host's sign of life in SQL; ends leases that nobody serves any more."""
        served = [keeper.lease.id for keeper in self._keepers.values() if keeper.lease]
        for lease, why in self._registration.renew(served):
            self._settlements.add(lease, "worker_lost", _lost(why))

    def _lease(self) -> None:
        """Gives free slots to the runs that wait longest."""
        if not self._registration.done:
            return
        self._settlements.clear_withdrawn()
        with self._database.reading() as session:
            waiting = leases.queued(session)
        ready = self._alive(waiting) if waiting else []
        while ready and any(keeper.lease is None for keeper in self._keepers.values()):
            lease = self._acquire(ready)
            if lease is None:
                return
            log.info("%s goes to %s, epoch %d", lease.run_id, lease.slot, lease.epoch)
            self._keepers[lease.slot].take(lease)
            ready.remove(lease.run_id)

    def _alive(self, waiting: list[str]) -> list[str]:
        """Those that have not ended. One without a journal is still being made by the web tier."""
        heads = dict(zip(waiting, self._journal.heads(waiting), strict=True))
        ended = [run_id for run_id, head in heads.items() if head is not None and head.closed]
        if ended:
            with self._database.writing() as session:
                for run_id in ended:
                    leases.withdraw(session, run_id)
        return [run_id for run_id, head in heads.items() if head is not None and not head.closed]

    def _acquire(self, ready: list[str]) -> Lease | None:
        warm = {name: keeper.warm_worker() for name, keeper in self._keepers.items()}
        with self._database.writing() as session:
            return leases.acquire(session, self._settings.host_name, among=ready, warm=warm)

    def _start_spares(self) -> None:
        """Keeps a few workers ready for runs to come: a cold start takes seconds."""
        if any(keeper.phase == Phase.STARTING for keeper in self._keepers.values()):
            return  # one at a time: the first is wanted soon, and starting takes a whole core
        unleased = [keeper for keeper in self._keepers.values() if keeper.lease is None]
        if sum(keeper.phase != Phase.EMPTY for keeper in unleased) < SPARES:
            for keeper in [keeper for keeper in unleased if keeper.wants_spare][:1]:
                keeper.start()

    def _settle(self, lease: Lease, reason: str, error: SignalError | None) -> None:
        self._settlements.add(lease, reason, error)
        self._wake.set()  # the slot may be waited for

    def _sweep(self) -> None:
        self._journal.sweep()

    def _ping(self) -> None:
        self._journal.redis.ping()

    # --- workers ------------------------------------------------------------------------------

    def _on_exit(self, process: Process) -> None:
        """In the watcher's thread: whichever of the two processes ended, the other goes with it."""
        for keeper in self._keepers.values():
            worker = keeper.worker
            if worker is not None and process in (worker.parent, worker.child):
                worker.note_end(process)
                worker.kill()
        self._wake.set()

    def _remember(self) -> None:
        self._state.write([k.worker for k in self._keepers.values() if k.worker is not None])

    def _end_leftovers(self) -> None:
        """Ends workers of an agent that died; their runs end by the leases that nobody serves."""
        workers = self._state.read()
        for worker in workers:
            if not worker.gone():
                log.warning("%s was left over from an earlier agent", worker.node)
            worker.kill()
            self._settlements.forget(worker.node)
        _await_gone(workers, STOP_S)
        self._state.write([])

    def _end(self) -> None:
        """Stops the workers, warm if they manage within their time, and frees the slots."""
        self._watcher.close()
        workers = [keeper.worker for keeper in self._keepers.values() if keeper.worker is not None]
        for keeper in self._keepers.values():
            if keeper.worker is not None and keeper.lease is not None:
                keeper.worker.stop()
            elif keeper.worker is not None:
                keeper.worker.kill()  # it has nothing to finish
        _await_gone(workers, STOP_S)
        for worker in workers:
            worker.reap()
            self._settlements.forget(worker.node)
        self._state.write([])
        for keeper in self._keepers.values():
            if keeper.lease is not None:
                self._settlements.add(keeper.lease, "worker_lost", _lost("the server was stopped"))
        self._attempt("the end of leases", self._settlements.work)
        self._attempt("the host's end", self._registration.take_down)
        self._database.close()


def _await_gone(workers: Sequence[Worker], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(worker.gone() for worker in workers):
        time.sleep(0.05)


def _lost(why: str) -> SignalError:
    return SignalError("worker_lost", f"The run's worker was lost: {why}.")


def main() -> int:
    """Runs the agent of this host until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        settings = Settings.from_env()
        if not re.fullmatch(r"[A-Za-z0-9._-]+", settings.host_name):
            raise ValueError(f"SIGNAL_HOST_NAME cannot name a host: {settings.host_name!r}")
        slots = discover(settings.devices)
        with sole_agent(settings.data_dir / "run"):
            agent = Agent(settings, slots)

            def stop(_number: int, _frame: FrameType | None) -> None:
                agent.stop()

            signal.signal(signal.SIGTERM, stop)
            signal.signal(signal.SIGINT, stop)
            agent.run()
    except (ValueError, RuntimeError) as error:
        print(f"gpu_pool.agent: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
