"""kombu's Redis transport without its own book of what was delivered.

The journal is the truth and the agent rings again, so a doorbell need not outlive its worker. Without
the book a message costs four commands less, nothing is delivered twice after a visibility timeout, and
a consumer whose server was killed does not die of putting messages back over a connection that is gone.
"""

from __future__ import annotations

from typing import Any

from kombu.transport import redis


class Channel(redis.Channel):
    """Delivered messages are the consumer's own: they are neither recorded nor put back."""

    ack_emulation = False
    do_restore = False
    _kept: tuple[Any, Any] | None = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        """One client as long as its pool lives: a new one for each message is a fifth of what that costs."""
        if asynchronous:
            return super()._create_client(asynchronous)  # type: ignore[misc]
        pool = self.pool
        if self._kept is None or self._kept[0] is not pool:
            self._kept = (pool, super()._create_client())  # type: ignore[misc]
        return self._kept[1]


class Transport(redis.Transport):
    """What `broker_transport` names."""

    Channel = Channel
