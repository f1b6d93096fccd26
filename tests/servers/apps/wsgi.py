"""The app for gunicorn and uWSGI."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import events


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    answer = events.track() if environ["PATH_INFO"] == "/track" else {}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]
