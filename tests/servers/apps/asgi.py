"""The FastAPI app for uvicorn."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import events
from fastapi import FastAPI


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    if os.environ.get("EVENTS_AT_END") == "shutdown":
        events.analytics.shutdown(10)


app = FastAPI(lifespan=lifespan)


@app.get("/")
async def up() -> dict[str, Any]:
    return {}


@app.get("/track")
def track_in_a_thread() -> dict[str, Any]:
    return events.track()


@app.get("/track-in-loop")
async def track_in_the_loop() -> dict[str, Any]:
    return events.track()
