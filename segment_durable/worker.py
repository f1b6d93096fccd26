"""One sender thread: waits for a batch to fill, has it delivered step by step, and waits as a step says."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

from segment_durable.clock import Clock
from segment_durable.config import Config
from segment_durable.delivery import Delivery, Step
from segment_durable.errors import OutboxError
from segment_durable.limiter import Limiter
from segment_durable.logs import get_log
from segment_durable.outbox import Outbox
from segment_durable.threads import Wake, start_thread

__all__ = ["Worker"]

log = get_log("sender")

_LOOK = 0.5  # seconds between looks at the outbox when idle: for the events of other processes, and for lost wake-ups
_FOREIGN_LOOK = 0.25  # the same while a batch fills: at the leases of other processes
_TROUBLE_WAIT = 1.0  # seconds after an error of the outbox
_NEVER = 1 << 62


class Worker:
    """One sender thread, with its own delivery and so its own connections.

    It has a thread and is none: gevent's patching replaces the class `threading.Thread`, and of a subclass made before
    that nobody would learn that it has ended.
    """

    def __init__(
        self,
        note: Callable[[Step, float], None],
        outbox: Outbox,
        config: Config,
        clock: Clock,
        make_delivery: Callable[[], Delivery],
    ) -> None:
        self._note = note
        self._outbox = outbox
        self._config = config
        self._clock = clock
        self._make_delivery = make_delivery
        self._delivery: Delivery | None = None
        self._thread: threading.Thread | None = None
        self.event = Wake()
        self.appended = 0
        self.wake_at = 1  # events appended that wake the thread
        self._through: int | None = None  # all events up to that id have left, if the last step tells that
        self._flush_to: list[int] = []
        self._hurry = False
        self._began = 0.0  # the last step
        self._trouble = Limiter(60.0, clock)
        self._on_end: list[Callable[[], None]] = []
        self._end_lock = threading.RLock()
        self._ended = False
        self.stopping = False

    def start(self) -> bool:
        """Whether a thread could be started."""
        thread = start_thread(self._run, "segment-durable-sender")
        self._thread = self._thread or thread
        return thread is not None

    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def is_current(self) -> bool:
        return self._thread is threading.current_thread()

    def join(self, timeout: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout)

    def hurry_to(self, target: int) -> None:
        self._flush_to.append(target)
        self._hurry = True
        self.event.set()

    def hurried(self, target: int) -> None:
        self._flush_to.remove(target)

    def stop(self, then: Callable[[], None]) -> None:
        with self._end_lock:
            ended = self._ended
            if not ended:
                self._on_end.append(then)
        self.end()
        if ended:
            then()

    def end(self) -> None:
        self.stopping = True
        self.event.set()

    def _run(self) -> None:
        self._thread = threading.current_thread()
        try:
            while not self.stopping:
                self._arm(1)
                step = self._try_step()
                if step is not None:
                    self._through = step.through if self._config.thread == 1 else None
                    self._note(step, self._began)
                    self._wait_after(step)
        finally:
            try:
                if self._delivery is not None:
                    self._delivery.close()
            finally:  # that may call a callback, which may call sys.exit()
                with self._end_lock:
                    self._ended = True
                    callbacks = list(self._on_end)
                for callback in callbacks:
                    callback()

    def _is_under_way(self) -> bool:
        return self._delivery is not None and self._delivery.is_under_way

    def _try_step(self) -> Step | None:
        """One step, or None to look again."""
        try:
            filled = "full" if self._is_under_way() else self._fill()
            if filled == "again":
                return None
            if filled == "empty":
                # Not leased all the same: what is appended by then is to wait for its batch.
                return Step("empty", seconds=None)
            self._began = self._clock.boot()  # before the look whether to hurry: see `Sender.flush`
            hurry, self._hurry = self._hurry, False
            # Made in this thread, at the first need: it imports what the callers don't need.
            self._delivery = self._delivery or self._make_delivery()
            return self._delivery.step(hurry=hurry)
        except BaseException as problem:
            # Trouble with the disk, a callback that calls sys.exit(), or a defect of ours: none of them may end
            # delivery for good.  "exhausted", because a flush must not wait for what may not end.
            self._complain(problem, exc_info=not isinstance(problem, OutboxError))
            return Step("failed", seconds=_TROUBLE_WAIT, exhausted=True)

    def _wait_after(self, step: Step) -> None:
        if step.progress or self.stopping:
            return
        if step.kind != "empty":
            self._arm(_NEVER)  # new events change nothing: wait for the time, a flush or the end
            if self._hurry or self.stopping:
                return
        self._clock.wait(self.event, _LOOK if step.seconds is None else min(step.seconds, 3600.0))

    def _fill(self) -> Literal["full", "empty", "again"]:
        """Wait until the next batch is full, for `upload_interval` at most; "again": look again.

        Nothing is waited for while a flush is on, nor while others have all that may be leased.  Any lease of another
        process is a reason not to wait for long: its holder may have died, and what it had has waited long enough.
        """
        began = self._clock.boot()
        end = began + self._config.upload_interval
        while not self.stopping:
            self._arm(_NEVER)  # before the look: what is appended meanwhile is counted twice rather than not at all
            pending, leases, foreign = 0, 0, 0
            if self._through is not None:
                pending = self._outbox.newest() - self._through
            if pending <= 0:
                try:
                    pending, leases, foreign = self._outbox.load()
                except OutboxError:
                    return "full"  # the step meets the same trouble and reports it
            if pending == 0:
                self.wake_at = 1
                if self.appended:  # since the look
                    self.event.set()
                return "empty"
            missing = self._config.upload_size - pending
            now = self._clock.boot()
            if missing <= 0 or self._flush_to or now >= end or leases >= self._config.thread:
                return "full"
            if foreign > 0 and now >= began + _FOREIGN_LOOK:
                return "full"
            self.wake_at = missing
            if self.appended >= missing or self._flush_to or self.stopping:
                continue
            if not self._clock.wait(self.event, min(end - now, _FOREIGN_LOOK)):
                self._through = None  # others may have appended, or died: look at the disk
        return "again"

    def _arm(self, events: int) -> None:
        self.event.clear()
        self.appended = 0
        self.wake_at = events

    def _complain(self, problem: BaseException, *, exc_info: bool) -> None:
        times = self._trouble.tick()
        if times:
            log.error("delivery is held up (%d times): %s", times, problem, exc_info=exc_info)
