"""Starting and stopping a stack from a command: in the foreground, detached, or not at all if it runs.

A detached supervisor is a process of its own; it tells its starter through a pipe how it went.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from web.stack import environment, leftovers, orphans, services, state
from web.stack.children import tail
from web.stack.errors import AlreadyRunsError, StackError
from web.stack.folder import Folder
from web.stack.options import Options
from web.stack.stack import Stack, describe

REPORT_FD = "SIGNAL_REPORT_FD"
READY_TIMEOUT_S = 240.0
# The agent may wait for its workers to write snapshots, and the projector comes after it.
DOWN_TIMEOUT_S = services.AGENT_GRACE_S + 25.0
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def running(folder: Folder, timeout_s: float = READY_TIMEOUT_S) -> dict[str, Any] | None:
    """The stack that runs on the data folder, once it serves; None when there is none."""
    deadline = time.monotonic() + timeout_s
    while state.locked(folder):
        found = state.read(folder)
        if found and found.ready and found.supervised():
            return describe(folder, found)
        if time.monotonic() >= deadline:
            raise StackError(f"a stack is starting or stopping on {folder.root}; see {folder.logs}")
        time.sleep(0.1)
    return None


def foreground(options: Options, on_ready: Callable[[dict[str, Any]], None]) -> None:
    """Becomes the supervisor until Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format=_FORMAT, stream=sys.stderr)
    Stack(options, environment.current()).run(on_ready)


def detached(options: Options, on_ready: Callable[[dict[str, Any]], None]) -> None:
    """Starts a supervisor that outlives this process; returns when it serves. Raises StackError."""
    folder = Folder(Path(options.data_dir))
    folder.prepare()
    reader, writer = os.pipe()
    env = environment.for_process(environment.current(), {REPORT_FD: str(writer)})
    # For the log, which is opened before the supervisor can see to it that nobody else reads it.
    os.umask(0o077)
    with folder.log("supervisor").open("ab") as log:
        since = log.tell()
        child = subprocess.Popen(
            services.python("web.stack.launch", options.to_json()),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder.working,
            env=env,
            pass_fds=(writer,),
            start_new_session=True,
        )
    os.close(writer)
    report = _read_report(reader)
    if report is None:
        child.kill()
        words = tail(folder.log("supervisor"), since=since)
        raise StackError(f"the stack did not start:\n{words}")
    if "error" in report:
        child.wait()
        raise (AlreadyRunsError if report["runs"] else StackError)(report["error"])
    on_ready(report)


def _read_report(reader: int) -> dict[str, Any] | None:
    """The supervisor's one line; None when it ended without one, or takes too long."""
    received = b""
    deadline = time.monotonic() + READY_TIMEOUT_S
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return None
            if not (more := pipe.read(65_536)):
                return None
            received += more
    report: dict[str, Any] = json.loads(received)
    return report


def stop(folder: Folder) -> bool:
    """Stops the stack of a data folder, however much of it is left; False when nothing ran."""
    found = state.read(folder)
    supervised = bool(found and found.supervised())
    if found and supervised:
        leftovers.end([found.supervisor], grace_s=DOWN_TIMEOUT_S)
    # Only a supervisor that was killed leaves any.
    left = orphans.end(folder)
    folder.state.unlink(missing_ok=True)
    return supervised or left


def main(arguments: list[str], env: Mapping[str, str]) -> int:
    """The detached supervisor's process."""
    logging.basicConfig(level=logging.INFO, format=_FORMAT, stream=sys.stderr)
    base = dict(env)
    pipe = os.fdopen(int(base.pop(REPORT_FD)), "w")
    os.set_inheritable(pipe.fileno(), False)

    def report(message: dict[str, Any]) -> None:
        # The starter waits for one line; it may have gone meanwhile.
        with suppress(BrokenPipeError), pipe:
            pipe.write(json.dumps(message) + "\n")

    try:
        Stack(Options.from_json(arguments[0]), base).run(report)
    except StackError as error:
        logging.getLogger("signal.stack").error("%s", error)
        if not pipe.closed:
            report({"error": str(error), "runs": isinstance(error, AlreadyRunsError)})
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], os.environ))
