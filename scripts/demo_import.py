"""What `scripts/demo` does.  As a program of its own it is the job that gets killed: it imports a log as events."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
BUNDLED_LOG = Path(__file__).with_name("demo_log.jsonl")
MOST_COMMITS = 2000
WRITE_KEY = "demo-write-key"


def main() -> int:
    """Show it; 0 if nothing was lost."""
    from segment_durable.testing import Drop, Honest, Receiver

    log, source = read_log()
    say(f"{len(log)} events to import, from {source}.")
    with (
        tempfile.TemporaryDirectory(prefix="segment-durable-demo-") as folder,
        Receiver(write_key=WRITE_KEY) as receiver,
    ):
        outbox = Path(folder) / "outbox"
        say(f"A receiver as strict as Segment's API listens on {receiver.url}; the outbox is {outbox}.")

        receiver.script(Honest(), Drop(after=True))
        say("It will lose its second answer on the way: the batch is taken, and the sender can't know.")

        kill_after = len(log) // 2
        say(f"\nFirst run: a process calls track() for each. After {kill_after} calls it is killed with SIGKILL ...")
        acknowledged = run_job(receiver.url, outbox, log, kill_after)
        say(f"  killed. {acknowledged} calls had returned (True, message) by then.")
        arrived = len(receiver.unique)
        stats = inspect(outbox)
        both = max(0, arrived + stats["pending"] - acknowledged)
        say(f"  {arrived} events had arrived; {stats['pending']} wait in the outbox on disk, {both} of them in doubt:")
        say("  they had arrived, but their answer was lost, so they are sent again under the same messageId.")

        say("\nSecond run: the same program again, for the rest; what the first one left goes out, too ...")
        acknowledged += run_job(receiver.url, outbox, log[acknowledged:], None)
        ids = [commit["id"] for commit in log]
        receiver.wait_for(lambda it: len(it.unique) >= len(set(ids)), timeout=10)
        stats = inspect(outbox)
        arrived_ids = [event["messageId"] for event in receiver.unique]
        lost = [each for each in ids if each not in set(arrived_ids)]
        checks = {
            "every event arrived": not lost,
            "in the order of the calls": arrived_ids == ids,
            "with its own time": all(
                datetime.fromisoformat(event["timestamp"]) == datetime.fromisoformat(commit["at"])
                for event, commit in zip(receiver.unique, log)
            ),
            "the outbox is empty": stats["pending"] == 0 and stats["dead"] == 0,
            "the books balance": stats["balanced"],
        }
        say("")
        table(
            [
                ("calls that returned (True, message)", acknowledged),
                ("events that arrived", len(arrived_ids)),
                ("lost", len(lost)),
                ("sent twice (same messageId, Segment keeps one)", receiver.duplicates),
                ("requests", len(receiver.requests)),
                *((name, "yes" if good else "NO") for name, good in checks.items()),
            ]
        )
        return 0 if all(checks.values()) else 1


def read_log() -> tuple[list[dict[str, str]], str]:
    """The commits, oldest first, as id, time, author's digest and subject; and where they come from."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "log",
        "--reverse",
        f"--max-count={MOST_COMMITS}",
        "--format=%H%x00%aI%x00%ae%x00%s",
    ]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
        lines = done.stdout.decode("utf-8", "replace").splitlines()
    except (OSError, subprocess.CalledProcessError):
        lines = []
    log = []
    for line in lines:
        sha, at, email, subject = line.split("\0", 3)
        author = hashlib.sha256(email.encode()).hexdigest()[:12]
        log.append({"id": f"commit-{sha}", "at": at, "author": author, "subject": subject})
    if len(log) >= 4:
        return log, "this repository's git log"
    bundled = [json.loads(line) for line in BUNDLED_LOG.read_text("utf-8").splitlines()]
    return bundled, "a small bundled log (there is no git history here)"


def run_job(url: str, outbox: Path, log: list[dict[str, str]], kill_after: int | None) -> int:
    """Start the job on `log`, kill it after so many acknowledged calls, if any; how many it acknowledged."""
    job = subprocess.Popen(
        [sys.executable, __file__, url, str(outbox)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert job.stdin is not None
    assert job.stdout is not None
    acknowledged = 0
    with job, job.stdin as to_job, job.stdout as from_job:
        for commit in log:
            # The job gets a commit when it has acknowledged the one before, so it can be killed at a known place.
            to_job.write(json.dumps(commit) + "\n")
            to_job.flush()
            if from_job.readline() != "accepted\n":
                break
            acknowledged += 1
            progress(acknowledged, kill_after or len(log))
            if acknowledged == kill_after:
                job.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
                break
    say("")
    return acknowledged


def job(commits: TextIO, url: str, outbox: str) -> None:
    """The job itself, as anybody would write it: a few lines that know nothing of crashes."""
    import segment_durable as analytics

    analytics.write_key = WRITE_KEY
    analytics.host = url
    analytics.outbox_dir = outbox
    analytics.upload_size = 6

    for line in commits:
        commit = json.loads(line)
        accepted, _ = analytics.track(
            commit["author"],
            "Commit Authored",
            {"subject": commit["subject"]},
            timestamp=datetime.fromisoformat(commit["at"]),
            message_id=commit["id"],
        )
        print("accepted" if accepted else "refused", flush=True)
    analytics.shutdown()


def inspect(outbox: Path) -> dict[str, int]:
    """What the bundled inspector says of the outbox."""
    command = [sys.executable, str(ROOT / "scripts" / "outbox.py"), "status", str(outbox), "--verify", "--json"]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    status: dict[str, int] = json.loads(done.stdout)
    return status


def say(text: str) -> None:
    print(text, flush=True)


def progress(done: int, of: int) -> None:
    if sys.stdout.isatty() or done == of:
        print(f"\r  {done} of {of}", end="", flush=True)


def table(rows: list[tuple[str, object]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


if __name__ == "__main__":
    job(sys.stdin, *sys.argv[1:])
