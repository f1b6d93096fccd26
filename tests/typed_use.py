"""What a type checker makes of a program that uses the package; checked by mypy, and never run.

Each `type: ignore` is an assertion: mypy says so where there is nothing to ignore.
"""

from typing import Any

import segment_durable as analytics
from segment_durable import Client, OutboxStats


def on_error(error: Exception, items: list[dict[str, Any]]) -> None:
    print(error, len(items))


def the_module() -> OutboxStats:
    analytics.write_key = "YOUR_WRITE_KEY"
    analytics.on_error = on_error
    analytics.max_queue_size = 100
    analytics.max_queue_size = "100"  # type: ignore[assignment]
    analytics.wriet_key = "YOUR_WRITE_KEY"  # type: ignore[attr-defined]
    accepted, message = analytics.track("f4ca124298", "Signed Up", {"plan": "Enterprise"})
    accepted = message  # type: ignore[assignment]
    analytics.trakc("f4ca124298", "Signed Up")  # type: ignore[attr-defined]
    analytics.track("f4ca124298", event=7)  # type: ignore[arg-type]
    flushed: bool = analytics.flush(timeout=5)
    analytics.default_client = None
    assert flushed
    assert accepted
    return analytics.stats()


def a_client() -> None:
    with Client("YOUR_WRITE_KEY", on_error=on_error, upload_size=50) as client:
        client.identify(user_id=7, traits={"plan": "Enterprise"})
        client.idnetify(user_id=7)  # type: ignore[attr-defined]
        host: str | None = client.host
        limit: int = client.max_queue_size
        client.send = False  # type: ignore[misc]
        client.outbox_path  # type: ignore[attr-defined]
    print(host, limit)
