"""The Celery application and the doorbells: a message says "look at the journal", no more.

Order, retries and exactly-once effects come from the journal (`facts` about the Redis transport:
messages can be lost, doubled and reordered), so nothing here is relied on for correctness.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from celery import Celery
from kombu import Queue
from redis import Redis

from workers.queue import keys
from workers.settings import Settings

WAKE = "wake"


def make_app(settings: Settings) -> Celery:
    """The application that web tier, agent, workers and Flower share."""
    app = Celery("signal", broker=settings.redis_url, set_as_current=False)
    app.conf.update(
        broker_transport="workers.queue.transport:Transport",
        broker_transport_options={
            "health_check_interval": 10,
            "socket_keepalive": True,
            "socket_timeout": 30,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_pool_limit=20,
        task_acks_late=True,
        worker_prefetch_multiplier=8,
        task_reject_on_worker_lost=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        task_ignore_result=True,
        result_backend=None,
        task_serializer="json",
        accept_content=["json"],
        task_default_queue="signal.unused",
        worker_send_task_events=True,
        task_send_sent_event=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_max_tasks_per_child=None,
        worker_soft_shutdown_timeout=20,
        event_queue_expires=60,
        event_queue_ttl=5,
    )
    return app


def ring(
    app: Celery,
    settings: Settings,
    run_id: str,
    admitted: Iterable[tuple[int, str]],
    bell_was_free: bool,
) -> None:
    """Ring the run's doorbell for operations that became eligible.

    `each`: one message per operation, so that Flower shows every primitive as a Celery task;
    `coalesced`: one message for all, and the session sends the per-operation events itself.
    """
    if settings.doorbell == "coalesced":
        if bell_was_free:
            publish(app, keys.queue(run_id), WAKE, [run_id])
        return
    for entry, kind in admitted:
        publish(app, keys.queue(run_id), kind, [run_id, entry])


def wake(app: Celery, run_id: str) -> None:
    """Ring without a reason of its own: the agent does, when a run has work and makes no progress."""
    publish(app, keys.queue(run_id), WAKE, [run_id])


def publish(app: Celery, queue: str, task: str, args: list[Any]) -> None:
    """Send a task by name straight to a queue, declaring nothing (the anonymous direct exchange)."""
    # Only a queue *object* keeps Celery's router from replacing it by the default queue.
    target = Queue(queue, exchange="", routing_key=queue)
    options: Any = {"queue": target, "declare": (), "ignore_result": True, "retry": False}
    app.send_task(task, args=args, **options)


def release_queue(app: Celery, run_id: str) -> None:
    """Delete a run's queue and its broker keys."""
    delete_queue(app, keys.queue(run_id))


def delete_queue(app: Celery, name: str) -> None:
    """Delete a queue that a worker consumed, with the bindings that kombu made for it."""
    with app.connection_for_write() as connection:
        client: Redis = connection.default_channel.client  # type: ignore[attr-defined]
        client.delete(name, f"_kombu.binding.{name}", f"_kombu.binding_permanent.{name}")
