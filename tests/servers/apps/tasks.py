"""A Celery app whose task tracks one event."""

from __future__ import annotations

import os
from typing import Any

import events
from celery import Celery
from celery.signals import worker_process_shutdown

app = Celery("tasks", broker=os.environ["EVENTS_REDIS"], backend=os.environ["EVENTS_REDIS"])
# A task whose worker child is killed goes back to the queue.
app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True, worker_prefetch_multiplier=1)
app.conf.update(broker_connection_retry_on_startup=True)
# What a killed main process had taken from the queue is back there after a second, instead of an hour.
app.conf.update(
    broker_transport_options={
        "visibility_timeout": 1,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 1,
    }
)


@app.task(name="tasks.track")
def track() -> dict[str, Any]:
    return events.track()


if os.environ.get("EVENTS_AT_END") == "shutdown":

    @worker_process_shutdown.connect
    def deliver(**kwargs: Any) -> None:
        events.analytics.shutdown(5)
