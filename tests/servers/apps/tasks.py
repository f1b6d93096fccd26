"""A Celery app whose tasks track one event, or as many as they can."""

from __future__ import annotations

import os
import time
from typing import Any

import events
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
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


@app.task(name="tasks.track_until_the_limit", soft_time_limit=1)
def track_until_the_limit() -> dict[str, Any]:
    """A signal handler raises in the middle of what this does, which is in the outbox mostly."""
    ids = []
    try:
        while True:
            ids.append(tracked()["id"])
    except SoftTimeLimitExceeded:
        return {**tracked(), "ids": ids}


def tracked() -> dict[str, Any]:
    """As `events.track`, once there is room: such a task fills the outbox."""
    while (answer := events.track())["id"] is None:
        time.sleep(0.01)
    return answer


if os.environ.get("EVENTS_AT_END") == "shutdown":

    @worker_process_shutdown.connect
    def deliver(**kwargs: Any) -> None:
        events.analytics.shutdown(5)
