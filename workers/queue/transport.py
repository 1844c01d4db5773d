"""kombu's Redis transport without its own book of what was delivered.

The journal is the truth and the agent rings again, so a doorbell need not outlive its worker. Without
the book a message costs four commands less, nothing is delivered twice after a visibility timeout, and
a consumer whose server was killed does not die of putting messages back over a connection that is gone.
"""

from __future__ import annotations

from kombu.transport import redis


class Channel(redis.Channel):
    """Delivered messages are the consumer's own: they are neither recorded nor put back."""

    ack_emulation = False
    do_restore = False


class Transport(redis.Transport):
    """What `broker_transport` names."""

    Channel = Channel
