"""What all apps share: one client, and one call that says whether its event was accepted.

The client is made when this is imported: in the master where a server loads the app there, else in each worker.
"""

from __future__ import annotations

import os
from typing import Any

import segment_durable as analytics

analytics.write_key = "test-key"
analytics.host = os.environ["EVENTS_HOST"]
analytics.outbox_dir = os.environ["EVENTS_OUTBOX"]
# Small batches and short waits: many of them are on their way when something happens.
analytics.upload_size, analytics.upload_interval = 10, 0.05

if os.environ.get("EVENTS_AT_IMPORT") == "track":
    # The threads of the client run by the time that the server forks.
    analytics.track("import", "Loaded")
elif os.environ.get("EVENTS_AT_IMPORT") == "client":
    analytics.stats()


def track() -> dict[str, Any]:
    """Track one event: its message id if it was accepted, else None, and who did it."""
    accepted, message = analytics.track("request", "Requested")
    return {"id": message["messageId"] if accepted else None, "pid": os.getpid()}
