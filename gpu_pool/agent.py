"""The agent of a host: leases its slots to queued runs and runs their workers.

`python -P -m gpu_pool.agent`, one per data folder. A loop of small duties, each of which may fail
when SQL or Redis is away and is then done again in the next round; what must not wait for either,
the end of a process, is seen by a thread of its own. Its death ends no worker: the next one adopts
them. SIGTERM drains the workers and puts their runs back into the queue.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
import time
from collections.abc import Callable
from threading import Event
from types import FrameType

from kombu.exceptions import OperationalError as BrokerError
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError

from gpu_pool import leases
from gpu_pool.adoption import adopt
from gpu_pool.control import WorkerControl
from gpu_pool.database import Database
from gpu_pool.devices import Slot, discover
from gpu_pool.draining import drain
from gpu_pool.exits import End
from gpu_pool.keeper import SlotKeeper
from gpu_pool.leases import Lease, Standing
from gpu_pool.leasing import Leasing
from gpu_pool.listen import Listener
from gpu_pool.memory import OutOfMemory, find_counter
from gpu_pool.parting import Parting
from gpu_pool.pool import Pool
from gpu_pool.process import Process
from gpu_pool.registration import Registration
from gpu_pool.settlement import Settlements
from gpu_pool.spares import Spares
from gpu_pool.state import StateFile, sole_agent
from gpu_pool.watch import Watcher
from workers.queue.app import make_app
from workers.queue.journal import Journal, connect
from workers.settings import Settings
from workers.storage import open_storage

log = logging.getLogger("gpu_pool.agent")

TICK_S = 0.5
POLL_S = 0.03
EAGER_ROUNDS = 6
# For the Celery parent to log its child's status, where the kernel no longer tells it.
LOG_S = 0.05

_AWAY = (RedisError, BrokerError, DBAPIError, OSError)


class Agent:
    """One host's slots, their keepers and the duties of the loop."""

    def __init__(self, settings: Settings, slots: list[Slot]) -> None:
        """Connects lazily: SQL and Redis may come up later than the agent."""
        self._settings = settings
        self._database = Database(settings.database_url)
        redis, app = connect(settings.redis_url, timeout_s=2.0), make_app(settings)
        self._journal = Journal(redis, open_storage(settings), settings)
        control = WorkerControl(app, redis)
        self._settlements = Settlements(self._database, app, self._journal, control)
        self._registration = Registration(self._database, settings.host_name, slots)
        self._state = StateFile(settings.data_dir / "run")
        self._records = self._state.read()
        self._adopted = self._noted = False
        self._wake, self._stopping, self._eager = Event(), False, 0
        self._called: set[str] = set()
        self._memory = OutOfMemory(find_counter())
        self._watcher = Watcher(self._on_exit)
        pool = Pool(
            settings, app, self._journal, control, self._watcher,
            self._settle, self._changed, self._settlements.forget, self._standing,
        )  # fmt: skip
        spare = SlotKeeper(slots[0], pool)
        self._slots = {
            slot.name: SlotKeeper(slot, pool, lambda wanted: self._spares.ready_for(wanted))
            for slot in slots
        }
        self._leasing = Leasing(settings, self._database, self._journal, self._slots)
        self._spares = Spares(list(self._slots.values()), spare)
        self._keepers = {**self._slots, "": spare}
        self._troubles: dict[str, str] = {}

    def stop(self) -> None:
        """Ends `run` after its present round. Only sets a flag, so a signal handler may call it."""
        self._stopping = True

    def run(self) -> None:
        """Serves until stopped."""
        self._watcher.start()
        listener = Listener(self._settings.redis_url, self._call)
        listener.start()
        while not self._stopping:
            self.round()
            self._rest()
        self._end()

    def _call(self, run_id: str) -> None:
        """In the listener's thread: something happened to a run."""
        self._called.add(run_id)
        self._wake.set()

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
        # Until it is known who serves which lease, none can be judged.
        if not self._attempt("the workers of an earlier agent", self._adopt):
            return
        self._attempt("the host's renewal", self._renew)
        self._memory.look()
        # Without Redis every other duty would wait for it in turn, and the host would seem lost.
        if self._attempt("Redis", self._ping):
            self._serve()
        self._attempt("the agent's notes", self._note)

    def _serve(self) -> None:
        self._attempt("the end of leases", self._settlements.work)
        self._attempt("runs that have ended", self._settlements.clear_withdrawn)
        self._attempt("leasing", self._lease)
        for name, keeper in self._keepers.items():
            self._attempt(f"slot {name}" if name else "the spare worker", keeper.step)
        self._attempt("spare workers", self._start_spares)
        self._attempt("idle runs", self._leasing.pause_idle)
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

    def _adopt(self) -> None:
        """Once: goes on with the workers of the agent before."""
        if self._adopted:
            return
        for node in adopt(self._settings, self._database, self._records, self._keepers):
            self._settlements.forget(node)
        self._adopted = True

    def _renew(self) -> None:
        """The host's sign of life in SQL; ends leases that nobody serves any more."""
        served = {
            tenancy.lease.id: keeper
            for keeper in self._slots.values()
            for tenancy in keeper.tenancies
        }
        found = self._registration.renew(served)
        for lease, parting in found.unserved:
            self._settlements.add(lease, parting)
        for lease_id in found.over:
            served[lease_id].give_up(lease_id)

    def _lease(self) -> None:
        if self._registration.done:
            called, self._called = self._called, set()
            self._leasing.lease(called)

    def _start_spares(self) -> None:
        # A slot that is only just free may be wanted in the next moment, by the run that was there.
        if not self._settlements.due:
            self._spares.start()

    def _settle(self, lease: Lease, parting: Parting) -> None:
        self._settlements.add(lease, parting)
        self._wake.set()  # the slot may be waited for

    def _standing(self, run_id: str) -> Standing | None:
        with self._database.reading() as session:
            return leases.standing(session, run_id)

    def _sweep(self) -> None:
        self._journal.sweep()

    def _ping(self) -> None:
        self._journal.redis.ping()

    # --- workers ------------------------------------------------------------------------------

    def _on_exit(self, process: Process, status: int | None) -> None:
        """In the watcher's thread: whichever of the two processes ended, the other goes with it."""
        for keeper in self._keepers.values():
            worker = keeper.worker
            if worker is None or process not in worker.processes():
                continue
            if status is None and process == worker.child:
                time.sleep(LOG_S)
            killed = status == -signal.SIGKILL and process == worker.child
            worker.note_end(End(process, status, killed and self._memory.claim()))
            worker.kill()
        self._wake.set()

    def _changed(self) -> None:
        self._noted = False

    def _note(self) -> None:
        """What the next agent must know, if this one should die."""
        if not self._noted:
            records = [keeper.record(name) for name, keeper in self._keepers.items()]
            self._state.write(record for record in records if record is not None)
            self._noted = True

    def _end(self) -> None:
        """Drains the workers, puts their runs back into the queue, and frees the slots."""
        if not self._adopted:
            return  # it never got to know what it serves: the next one will
        keepers = list(self._keepers.values())
        for worker in drain(keepers, self._settle):
            self._settlements.forget(worker.node)
        self._watcher.close()
        self._attempt("the end of leases", self._settlements.work)
        self._attempt("the host's end", self._registration.take_down)
        self._changed()
        self._attempt("the agent's notes", self._note)
        self._database.close()


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
