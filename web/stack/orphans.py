"""The processes of a stack whose supervisor was killed: they serve on, until they are adopted or ended.

Reads stack.json and the marks in /proc; sends signals.
"""

from __future__ import annotations

from web.stack import leftovers, state
from web.stack.folder import Folder
from web.stack.services import AGENT_GRACE_S

# Web and the agent first: they make work for the others. What they committed is still projected.
STOPPING = (("web", "agent", "flower"), ("projector",), ("redis",))


def end(folder: Folder) -> bool:
    """Ends them in the order of an ordinary stop, so that sessions are snapshotted; False when there
    were none."""
    found = state.read(folder)
    recorded = found.processes if found and found.everyone() else {}
    ended = False
    for stage in STOPPING:
        alive = [recorded[name] for name in stage if name in recorded and recorded[name].alive()]
        leftovers.end(alive, grace_s=AGENT_GRACE_S if "agent" in stage else 10.0)
        ended = ended or bool(alive)
    # What was never recorded, or was started meanwhile.
    return bool(leftovers.sweep(folder)) or ended
