"""The threads around `Delivery.step`: started at the first need, woken, flushed and stopped."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable

from segment_durable.clock import Clock
from segment_durable.config import Config
from segment_durable.delivery import Delivery, Step
from segment_durable.errors import OutboxBusy, OutboxError
from segment_durable.outbox import Outbox
from segment_durable.threads import PatientLock
from segment_durable.worker import Worker

__all__ = ["Sender"]

_FLUSH_LOOK = 0.05  # seconds between looks in `flush`, for what other processes deliver
_BUSY = 10.0  # seconds to wait for other threads at the outbox, where the caller named none
_GLANCE = 0.02  # seconds for a look at the outbox where there is no time: another thread may be looking just then


class Sender:
    """Delivers one outbox in `config.thread` threads of this process.

    All methods may be called from any thread, in any order, and any number of times.
    """

    def __init__(self, outbox: Outbox, config: Config, clock: Clock, make_delivery: Callable[[], Delivery]) -> None:
        self._outbox = outbox
        self._config = config
        self._clock = clock
        self._make_delivery = make_delivery
        self._lock = PatientLock()
        self._workers: list[Worker] = []
        self._leaving: list[Worker] = []  # told to end, and maybe at an upload still
        self._closed = False
        self._inline: Delivery | None = None
        self._inline_ends = False
        self._inline_lock = PatientLock()
        self._after_inline: list[Callable[[], None]] = []  # to be called when nobody delivers in `drain` any more
        # Taken by itself, not by way of the condition, which is Python code: a signal handler may raise in there.
        self._changing = threading.RLock()
        self._changed = threading.Condition(self._changing)  # notified after a step that ends the wait of a flush
        self._left = 0  # events that left by steps of this sender
        self._goals: list[int] = []  # what `_left` has to come to for the flushes that wait
        # Of the last step that failed, on the boot clock: when it had begun, and when the next attempt is due if the
        # retry budget was used up.
        self._last_failure: tuple[float, float | None] = (0.0, None)

    @property
    def is_running(self) -> bool:
        return any(worker.is_alive() for worker in self._workers)

    def appended(self) -> None:
        """An event was appended.  Cheap: it is called for each."""
        workers = self._workers
        if not workers:
            self.start()
            workers = self._workers
        for worker in workers:
            # Not atomic between threads: a lost count costs at most the wait that ends the fill.
            worker.appended = appended = worker.appended + 1
            if appended >= worker.wake_at and not worker.event.is_set():
                worker.event.set()

    def start(self) -> bool:
        """Start the threads if they aren't running; False if none can be started any more."""
        if self._lock.is_owned():
            return True  # within a signal handler: it is being done
        with self._lock:
            if self._closed:
                return False
            self._workers = [worker for worker in self._workers if worker.is_alive() and not worker.stopping]
            while len(self._workers) < self._config.thread:
                worker = Worker(self.note, self._outbox, self._config, self._clock, self._make_delivery)
                try:
                    if not worker.start():
                        break
                    self._workers = [*self._workers, worker]
                except BaseException:
                    worker.end()  # a signal handler's: whether it has a thread or not, nobody knows of it
                    raise
            is_running = bool(self._workers)
        if self._closed:  # meanwhile, by a signal handler
            self.stop(0.0, _nothing)
        return is_running

    def flush(self, timeout: float | None = None) -> bool:
        """Deliver all that is pending now; whether all of it has left the outbox.

        `timeout`: seconds, 0: only looks; `None` waits for as long as it takes.  Either ends when the retry budget is
        used up, but a number not before an attempt that the receiver allows within that time.
        Raises `OutboxError` if the outbox can't be read.  In a signal handler that has interrupted a call on this
        outbox it is False: whoever delivers may wait for that call.
        """
        if not self._outbox.is_outermost():
            return False
        end = None if timeout is None else self._clock.boot() + timeout
        target = self._outbox.last_id(_BUSY if timeout is None else max(_GLANCE, timeout))
        left, missing = self._left, self._missing(target, end)
        if not missing:
            return True
        if end is not None and end <= self._clock.boot():
            return False  # and nothing is sent that nobody waits for: it might have to be sent again
        if any(worker.is_current() for worker in (*self._workers, *self._leaving)):
            return False  # a callback: its thread is the one that would have to deliver
        if not self.start():
            return self.drain(target, end)
        workers = list(self._workers)
        for worker in workers:
            worker.hurry_to(target)
        began = self._clock.boot()
        try:
            while missing:
                remaining = _FLUSH_LOOK if end is None else min(_FLUSH_LOOK, end - self._clock.boot())
                if remaining <= 0:
                    return False
                failed, due = self._last_failure
                # Not what was under way already: it was not made to hurry.
                if failed >= began and due is not None and (end is None or due >= end):
                    return False
                if not any(worker.is_alive() for worker in workers):
                    return self.drain(target, end)
                self._wait_for(left + missing, remaining)
                left, missing = self._left, self._missing(target, end)
            return True
        finally:
            for worker in workers:
                worker.hurried(target)

    def hurry(self) -> None:
        """From now on wait for no batch to fill; for when `flush` and `close` follow."""
        with contextlib.suppress(OutboxError):
            target = self._outbox.last_id(_GLANCE)
            for worker in self._workers:
                worker.hurry_to(target)

    def drain(self, target: int, end: float | None, *, tell: bool = False) -> bool:
        """Deliver in the calling thread until the event `target` has left, an attempt fails, or `end` (boot clock).

        `tell`: as for `Delivery.step`.
        For `sync_mode`, and for where no thread can be started.  A signal handler can't wait for what it has
        interrupted: there it is False at once.  Raises `OutboxError` if the outbox fails, or has been closed.
        """
        if self._inline_lock.is_owned() or not self._outbox.is_outermost():
            return False
        patience = None if end is None else max(0.0, end - self._clock.boot())
        return self._alone_inline(patience, lambda: self._deliver_inline(target, end, tell))

    def _alone_inline(self, timeout: float | None, work: Callable[[], bool]) -> bool:
        """Do that while nobody else delivers in `drain`; False, and nothing is done, if that takes longer to come."""
        got = True  # until it is known better: a signal handler may raise in between
        try:
            if not self._inline_lock.wait(timeout):
                got = False
                return False
            done = work()
            return done  # noqa: RET504  # apart: what a signal handler raises after the call is within the `try`
        finally:
            # Not one that was not got: another greenlet of this thread may have it.
            if got:
                try:
                    self._inline_lock.release()
                except RuntimeError:
                    pass  # nor was it where a signal handler has raised while it was waited for
                else:
                    self._call_after_inline()

    def _call_after_inline(self) -> None:
        while True:
            try:
                then = self._after_inline.pop()
            except IndexError:
                return
            then()

    def _deliver_inline(self, target: int, end: float | None, tell: bool) -> bool:
        if self._closed:
            raise OutboxBusy("the outbox has been closed")
        self._inline_ends = False
        try:
            delivery = self._inline = self._inline or self._make_delivery()
            # Others may have the lease; theirs ends, or dies, within that time.
            patience = self._clock.boot() + self._config.lease
            while not self._has_left(target, end):
                now = self._clock.boot()
                within = None if end is None else end - now
                if within is not None and within <= 0:
                    return False
                step = delivery.step(hurry=True, within=within, tell=tell)
                self.note(step, now)
                if step.kind == "leased" and now < patience:
                    self._clock.wait(threading.Event(), 0.01)
                elif not step.progress:
                    return self._has_left(target, end)
            return True
        except OutboxError:
            raise
        except BaseException:
            interrupted, self._inline = self._inline, None
            if interrupted is not None:
                interrupted.abandon()
            raise
        finally:
            if self._inline is not None:
                self._inline.rest()
                # Closed meanwhile, or before: nobody would come back for what it still holds.
                if self._inline_ends or self._closed:
                    self._inline.close()
                    self._inline = None

    def wait_for_others(self, target: int, seconds: float) -> bool:
        """Wait, at most `seconds`, until other processes have delivered up to the event `target`."""
        if not self._outbox.is_outermost():
            return False
        end = self._clock.boot() + seconds
        while not self._has_left(target, end):
            remaining = end - self._clock.boot()
            if remaining <= 0:
                return False
            self._clock.wait(threading.Event(), min(_FLUSH_LOOK, remaining))
        return True

    def close(self, timeout: float, then: Callable[[], None]) -> bool:
        """As `stop`, and no thread can be started afterwards."""
        with self._lock:
            self._closed = True
        return self.stop(timeout, then)

    def stop(self, timeout: float, then: Callable[[], None]) -> bool:
        """End the threads after the step they are at; whether they ended within `timeout` seconds.

        A later need starts them again.  `then` is called when the last of them has ended, and whoever delivers in
        `drain`, in that thread or in this one; one that waits for the network longer than `timeout` ends by itself when
        that wait does.
        """
        end = self._clock.boot() + timeout
        if not self._outbox.is_outermost():
            end = 0.0  # a signal handler: the threads may wait for what it has interrupted
        with self._lock:
            # Those that were told so before are waited for as well: the files must not be closed under an upload.
            self._leaving = [worker for worker in (*self._leaving, *self._workers) if worker.is_alive()]
            self._workers = []
            workers = list(self._leaving)
        ending = _Ending(len(workers) + 1, then)
        for worker in workers:
            worker.stop(ending.one_ended)
        self._inline_ends = True  # a thread that is delivering in `drain` closes its delivery when it leaves
        is_idle = self._end_inline(max(0.0, end - self._clock.boot()), ending.one_ended)
        for worker in workers:
            if not worker.is_current():
                worker.join(max(0.0, end - self._clock.boot()))
        return is_idle and not any(worker.is_alive() for worker in workers)

    def _end_inline(self, timeout: float, then: Callable[[], None]) -> bool:
        """Close the delivery of `drain`, and call `then`; in the thread that is in there if that takes longer."""
        self._after_inline.append(then)
        if self._inline_lock.is_owned():
            return False  # a callback, or a signal handler
        return self._alone_inline(timeout, self._close_inline)

    def _close_inline(self) -> bool:
        inline, self._inline = self._inline, None
        if inline is not None:
            inline.close()
        return True

    def note(self, step: Step, began: float) -> None:
        """A step was done, which had begun at `began`.

        Whoever waits in `flush` looks at the outbox only when that may have been the last one.  A look after each batch
        took a fifth of the time in which a backlog was delivered.
        """
        with self._changing:
            self._left += step.count
            if step.kind in ("failed", "backoff"):
                self._last_failure = (began, self._due_after(step))
            if not step.progress or any(goal <= self._left for goal in self._goals):
                self._changed.notify_all()

    def _due_after(self, step: Step) -> float | None:
        """When the next attempt is due, on the boot clock; None: a flush may wait for it however long that takes."""
        if not step.exhausted:
            return None
        # One attempt was made, and failed: the next one is no flush's, unless the receiver has said when it may be.
        return self._clock.boot() + (step.seconds or 0.0) if step.told else math.inf

    def _wait_for(self, goal: int, seconds: float) -> None:
        """Wait until so many events have left by this sender, or a step left it with nothing to do."""
        with self._changing:
            if self._left >= goal:
                return
            self._goals.append(goal)
            try:
                self._changed.wait(seconds)
            finally:
                self._goals.remove(goal)

    def _has_left(self, target: int, end: float | None) -> bool:
        return not self._missing(target, end)

    def _missing(self, target: int, end: float | None) -> int:
        """At most how many events up to `target` have not left."""
        first = self._outbox.first_id(_BUSY if end is None else max(_GLANCE, end - self._clock.boot()))
        return 0 if first is None else max(0, target - first + 1)


class _Ending:
    """Calls `then` when as many threads as there were have ended."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._left = count
        self._then = then
        self._lock = threading.RLock()

    def one_ended(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._then()


def _nothing() -> None:
    pass
