"""The embedded stack itself: what is started in which order, recorded where, and stopped how.

The supervisor's process runs this; `web.stack.launch` starts that process or becomes it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gpu_pool.process import Process, boot_id
from web.stack import environment, leftovers, orphans, ports, redis_server, services, state
from web.stack.children import Child, Service
from web.stack.errors import AlreadyRunsError, StackError
from web.stack.folder import Folder, once
from web.stack.options import Options
from web.stack.supervisor import Interrupted, Supervisor
from web.version import VERSION

log = logging.getLogger("signal.stack")

START_TIMEOUT_S = 120.0
REDIS_ATTEMPTS = 5
LOOPBACK, FLOWER_PORT = "127.0.0.1", 5555


class Stack:
    """One stack on one data folder, from its start to its end."""

    def __init__(self, options: Options, base: dict[str, str]) -> None:
        """`base` is the environment to start from."""
        self.options = options
        self.folder = Folder(Path(options.data_dir))
        self._base = base
        self._environment: dict[str, str] = {}
        self._listeners: dict[str, socket.socket] = {}
        self._supervisor = Supervisor(self.folder, self._record)
        me = Process.of(os.getpid())
        assert me is not None
        self.state = state.State(
            me, boot_id(), version=VERSION, host=options.host, started_at=time.time()
        )

    def run(self, on_ready: Callable[[dict[str, Any]], None]) -> None:
        """Starts all, reports once that it serves, keeps it running until a signal, stops all.

        Raises StackError where it cannot start; whatever had been started is stopped again.
        """
        os.umask(0o077)
        self.folder.prepare()
        held = state.lock(self.folder)
        if held is None:
            raise AlreadyRunsError(f"a stack runs on {self.folder.root} already")
        try:
            left = self._adoptable()
            if left is None:
                orphans.end(self.folder)
            with self._supervisor.listening():
                self._serve(on_ready, left)
        finally:
            self.folder.state.unlink(missing_ok=True)
            os.close(held)

    def _adoptable(self) -> state.State | None:
        """The stack of a supervisor that was killed, if it is the one that this one would start."""
        found = state.read(self.folder)
        if found is None or not found.ready or found.version != VERSION:
            return None
        redis_url = found.environment.get("REDIS_URL", "")
        redis = found.processes.get("redis")
        given = self._base.get("REDIS_URL")
        if not (redis.alive() if redis and not given else given == redis_url):
            return None
        self._set_environment(redis_url)
        wanted = (self.options.host, self.options.port or urlsplit(found.base_url).port)
        there = (found.host, urlsplit(found.base_url).port)
        return found if wanted == there and found.environment == self.state.environment else None

    def _serve(self, on_ready: Callable[[dict[str, Any]], None], left: state.State | None) -> None:
        try:
            if left:
                self._take_over(left)
            else:
                self._start()
            on_ready(describe(self.folder, self.state))
            self._supervisor.loop()
        except Interrupted:
            log.info("stopped before it served")
        finally:
            self.state.ready = False
            self._record()
            for listener in self._listeners.values():
                listener.close()
            self._supervisor.stop(orphans.STOPPING)
            # The agent ends its workers; this is for the case that it was killed before it could.
            for process in leftovers.sweep(self.folder):
                log.warning("ended pid %d, which was left over", process.pid)

    def _start(self) -> None:
        listener = ports.listen(self.options.host, self.options.port)
        self._listeners["web"] = listener
        port = int(listener.getsockname()[1])
        self.state.base_url = ports.url(self.options.host, port)
        self._start_redis()
        self._prepare()
        self._offer([self._supervisor.start(service) for service in self._services()])

    def _take_over(self, left: state.State) -> None:
        """Goes on with the processes that serve already, and starts those that have died since."""
        self.state.base_url, self.state.flower_url = left.base_url, left.flower_url
        own = []
        if "redis" in left.processes:
            port = urlsplit(self._environment["REDIS_URL"]).port
            assert port is not None
            own = [services.redis(self.folder, self._environment, port)]
        serving = []
        for service in (*own, *self._services()):
            process = left.processes.get(service.name)
            if process is not None and process.alive():
                restarts = left.restarts.get(service.name, 0)
                serving.append(self._supervisor.adopt(service, process, restarts))
            else:
                serving.append(self._supervisor.start(service))
        self._prepare()
        self._offer(serving)

    def _services(self) -> list[Service]:
        """All but the Redis-protocol server, which comes first."""
        env = self._environment
        return [
            services.web(env, self._web_listener, self.state.base_url),
            services.agent(env),
            services.projector(env),
            *self._flower(),
        ]

    def _web_listener(self) -> int:
        return self._listener("web", self.options.host, self.state.base_url)

    def _flower_listener(self) -> int:
        return self._listener("flower", LOOPBACK, self.state.flower_url)

    def _listener(self, name: str, host: str, url: str) -> int:
        """The socket that a service inherits; where it was adopted, opened when it has to start anew."""
        if name not in self._listeners:
            port = urlsplit(url).port
            assert port is not None
            self._listeners[name] = ports.listen(host, port)
        return self._listeners[name].fileno()

    def _offer(self, children: list[Child]) -> None:
        self._supervisor.wait_until_serving(children, START_TIMEOUT_S)
        self.state.ready = True
        self._record()

    def _start_redis(self) -> None:
        """Uses REDIS_URL where it is set, else starts a server of this data folder's own."""
        given = self._base.get("REDIS_URL")
        if given:
            self._set_environment(given)
            if not redis_server.serves(given):
                parts = urlsplit(given)
                raise StackError(
                    f"REDIS_URL: no server answers at {parts.hostname}:{parts.port or 6379}; start it, "
                    "or unset REDIS_URL to have one started"
                )
        else:
            self._start_own_redis()
        redis_server.claim(self._environment["REDIS_URL"], self._identity())

    def _start_own_redis(self) -> None:
        for attempt in range(1, REDIS_ATTEMPTS + 1):
            port = ports.free_port()
            self._set_environment(redis_server.url(self.folder, port))
            child = self._supervisor.start(services.redis(self.folder, self._environment, port))
            try:
                return self._supervisor.wait_until_serving((child,), START_TIMEOUT_S)
            except StackError as error:
                # Another program may have taken the port since it was found to be free.
                if "in use" not in str(error) or attempt == REDIS_ATTEMPTS:
                    raise
        return None

    def _set_environment(self, redis_url: str) -> None:
        own = {
            environment.MARK: str(self.folder.root),
            "REDIS_URL": redis_url,
            "SIGNAL_DATA_DIR": str(self.folder.root),
        }
        if self.options.devices:
            own["SIGNAL_DEVICES"] = self.options.devices
        self._environment = environment.for_process(self._base, own)
        # Recorded are the settings alone, not whatever else the user's environment holds.
        self.state.environment = environment.settings_of(self._environment)

    def _prepare(self) -> None:
        models = tuple(f"{name}={source}" for name, source in self.options.models)
        service = services.prepare(self._environment, models)
        self._supervisor.run_to_end(service, START_TIMEOUT_S)

    def _flower(self) -> list[Service]:
        if importlib.util.find_spec("flower") is None:
            log.warning("Flower is not installed: no page for operators (pip install flower)")
            return []
        if not self.state.flower_url:
            listener = ports.listen_preferring(LOOPBACK, FLOWER_PORT)
            self._listeners["flower"] = listener
            self.state.flower_url = ports.url(LOOPBACK, int(listener.getsockname()[1]))
        login, url = self.folder.flower_login.read_text().strip(), self.state.flower_url
        return [services.flower(self._environment, self._flower_listener, login, url)]

    def _identity(self) -> str:
        """Names this data folder in a Redis database that may be shared; it moves with the folder."""
        return once(self.folder.root / "stack_id", lambda: os.urandom(8).hex())

    def _record(self) -> None:
        children = self._supervisor.children.items()
        self.state.processes = {name: child.process for name, child in children if child.process}
        self.state.restarts = {name: child.restarts for name, child in children}
        try:
            state.write(self.folder, self.state)
        except OSError as error:
            # A full disk must not end what runs; `down` finds processes without the record too.
            log.warning("%s could not be written: %s", self.folder.state, error)


def describe(folder: Folder, found: state.State) -> dict[str, Any]:
    """What `up` prints of a stack that serves."""
    return {
        "base_url": found.base_url,
        "api_key": folder.api_key.read_text().strip(),
        "data_dir": str(folder.root),
        "flower_url": found.flower_url or None,
        "flower_login": folder.flower_login.read_text().strip(),
        "pid": found.supervisor.pid,
    }
