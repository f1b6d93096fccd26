"""What a process of the torture does until it is killed.  It is forked from a server that has imported all this."""

from __future__ import annotations

import os
import random
import warnings
from typing import Any

# All that a sender needs is imported here, once, by the server that the processes are forked from.
from segment_durable import Client
from segment_durable.message import encode_message

__all__ = ["track_until_killed"]


def track_until_killed(name: str, seed: int, settings: dict[str, Any], pipe: Any) -> None:
    """Track events, and write to the pipe what is about to be tried ("? id") and what was accepted ("+ id bytes").

    Ids are `name`-0, `name`-1 and so on.  A line is one write of at most PIPE_BUF bytes, so it is there whole or not.
    """
    warnings.simplefilter("error")
    chance = random.Random(seed)
    fd = pipe.fileno()
    client = Client(**settings)
    number = 0
    while True:
        for _ in range(chance.choice([1, 1, 3, 30])):
            message_id = f"{name}-{number}"
            number += 1
            kind = "poison" if chance.random() < 0.005 else "good"
            properties = {"n": number, "text": "é" * chance.randrange(0, 60), "x": chance.random()}
            os.write(fd, f"? {message_id}\n".encode())
            accepted, message = client.track(name, kind, properties, message_id=message_id)
            if accepted:
                os.write(fd, f"+ {message_id} ".encode() + encode_message(message) + b"\n")
        # Each flush goes before the end of a backoff, which would otherwise soon be longer than the whole test.
        client.flush(chance.choice([0, 0.02, 0.1]))
