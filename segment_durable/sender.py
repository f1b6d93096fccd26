"""The threads around `Delivery.step`: started at the first need, woken, flushed and stopped."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from segment_durable.clock import Clock
from segment_durable.config import Config
from segment_durable.delivery import Delivery, Step
from segment_durable.errors import OutboxError
from segment_durable.limiter import Limiter
from segment_durable.outbox import Outbox
from segment_durable.threads import start_thread

__all__ = ["Sender"]

log = logging.getLogger("segment.durable.sender")

_LOOK = 0.5  # seconds between looks at the outbox when idle: for the events of other processes, and for lost wake-ups
_TROUBLE_WAIT = 1.0  # seconds after an error of the outbox
_FLUSH_LOOK = 0.05  # seconds between looks in `flush`, for what other processes deliver
_BUSY = 10.0  # seconds to wait for other threads at the outbox, where the caller named none
_GLANCE = 0.02  # seconds for a look at the outbox where there is no time: another thread may be looking just then
_NEVER = 1 << 62


class Sender:
    """Delivers one outbox in `config.thread` threads of this process.

    All methods may be called from any thread, in any order, and any number of times.
    """

    def __init__(self, outbox: Outbox, config: Config, clock: Clock, make_delivery: Callable[[], Delivery]) -> None:
        self._outbox = outbox
        self._config = config
        self._clock = clock
        self._make_delivery = make_delivery
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._closed = False
        self._inline: Delivery | None = None
        self._inline_ends = False
        self._inline_lock = threading.Lock()
        self.changed = threading.Condition()  # notified after each step
        self.last_failure: tuple[int, bool] = (0, False)  # number of failed steps so far; was the budget used up

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
        with self._lock:
            if self._closed:
                return False
            living = [worker for worker in self._workers if worker.is_alive() and not worker.stopping]
            for _ in range(self._config.thread - len(living)):
                worker = _Worker(self, self._outbox, self._config, self._clock, self._make_delivery)
                if not worker.start():
                    break
                living.append(worker)
            self._workers = living
            return bool(living)

    def flush(self, timeout: float | None = None) -> bool:
        """Deliver all that is pending now; whether all of it has left the outbox.

        `timeout`: seconds; `None` waits for as long as it takes, and ends when the retry budget is used up.
        Raises `OutboxError` if the outbox can't be read.
        """
        end = None if timeout is None else self._clock.boot() + timeout
        target = self._outbox.last_id(_BUSY if timeout is None else max(_GLANCE, timeout))
        failures = self.last_failure[0]
        if self._has_left(target, end):
            return True
        if any(worker.is_current() for worker in self._workers):
            return False  # a callback: its thread is the one that would have to deliver
        if not self.start():
            return self.drain(target, end)
        workers = list(self._workers)
        for worker in workers:
            worker.hurry_to(target)
        try:
            while not self._has_left(target, end):
                remaining = _FLUSH_LOOK if end is None else min(_FLUSH_LOOK, end - self._clock.boot())
                if remaining <= 0:
                    return False
                count, exhausted = self.last_failure
                if count != failures and exhausted:
                    return False
                if not any(worker.is_alive() for worker in workers):
                    return self.drain(target, end)
                with self.changed:
                    self.changed.wait(remaining)
            return True
        finally:
            for worker in workers:
                worker.hurried(target)

    def drain(self, target: int, end: float | None) -> bool:
        """Deliver in the calling thread until the event `target` has left, an attempt fails, or `end` (boot clock).

        For `sync_mode`, and for where no thread can be started.
        """
        if not self._inline_lock.acquire(timeout=-1 if end is None else max(0.0, end - self._clock.boot())):
            return False
        try:
            self._inline_ends = False
            delivery = self._inline = self._inline or self._make_delivery()
            # Others may have the lease; theirs ends, or dies, within that time.
            patience = self._clock.boot() + self._config.lease
            while not self._has_left(target, end):
                now = self._clock.boot()
                within = None if end is None else end - now
                if within is not None and within <= 0:
                    return False
                step = delivery.step(hurry=True, within=within)
                self.note(step)
                if step.kind == "leased" and now < patience:
                    self._clock.wait(threading.Event(), 0.01)
                elif not step.progress:
                    return self._has_left(target, end)
            return True
        finally:
            if self._inline is not None:
                self._inline.rest()
                # Closed meanwhile, or before: nobody would come back for what it still holds.
                if self._inline_ends or self._closed:
                    self._inline.close()
                    self._inline = None
            self._inline_lock.release()

    def wait_for_others(self, target: int, seconds: float) -> bool:
        """Wait, at most `seconds`, until other processes have delivered up to the event `target`."""
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

        A later need starts them again.  `then` is called when the last of them has ended, in that thread or in this
        one; a thread that waits for the network longer than `timeout` ends by itself when that wait does.
        """
        with self._lock:
            workers, self._workers = self._workers, []
        end = self._clock.boot() + timeout
        self._inline_ends = True  # a thread that is delivering in `drain` closes its delivery when it leaves
        if self._inline_lock.acquire(timeout=timeout):
            inline, self._inline = self._inline, None
            if inline is not None:
                inline.close()
            self._inline_lock.release()
        ending = _Ending(len(workers), then)
        for worker in workers:
            worker.stop(ending.one_ended)
        for worker in workers:
            if not worker.is_current():
                worker.join(max(0.0, end - self._clock.boot()))
        if not workers:
            then()
        return not any(worker.is_alive() for worker in workers)

    def note(self, step: Step) -> None:
        with self.changed:
            if step.kind in ("failed", "backoff"):
                self.last_failure = (self.last_failure[0] + 1, step.exhausted)
            self.changed.notify_all()

    def _has_left(self, target: int, end: float | None) -> bool:
        first = self._outbox.first_id(_BUSY if end is None else max(_GLANCE, end - self._clock.boot()))
        return first is None or first > target


class _Ending:
    """Calls `then` when as many threads as there were have ended."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._left = count
        self._then = then
        self._lock = threading.Lock()

    def one_ended(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._then()


class _Worker:
    """One sender thread, with its own delivery and so its own connections.

    It has a thread and is none: gevent's patching replaces the class `threading.Thread`, and of a subclass made before
    that nobody would learn that it has ended.
    """

    def __init__(
        self,
        sender: Sender,
        outbox: Outbox,
        config: Config,
        clock: Clock,
        make_delivery: Callable[[], Delivery],
    ) -> None:
        self._sender = sender
        self._outbox = outbox
        self._config = config
        self._clock = clock
        self._make_delivery = make_delivery
        self._delivery: Delivery | None = None
        self._thread: threading.Thread | None = None
        self.event = threading.Event()
        self.appended = 0
        self.wake_at = 1  # events appended that wake the thread
        self._flush_to: list[int] = []
        self._hurry = False
        self._trouble = Limiter(60.0, clock)
        self._on_end: list[Callable[[], None]] = []
        self._end_lock = threading.Lock()
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
        self.stopping = True
        self.event.set()
        if ended:
            then()

    def _run(self) -> None:
        self._thread = threading.current_thread()
        try:
            while not self.stopping:
                self._arm(1)
                if self._is_under_way() or self._fill():
                    self._wait_after(self._step())
        finally:
            if self._delivery is not None:
                self._delivery.close()
            with self._end_lock:
                self._ended = True
                callbacks = list(self._on_end)
            for callback in callbacks:
                callback()

    def _is_under_way(self) -> bool:
        return self._delivery is not None and self._delivery.is_under_way

    def _step(self) -> Step:
        hurry, self._hurry = self._hurry, False
        try:
            # Made in this thread, at the first need: it imports what the callers don't need.
            self._delivery = self._delivery or self._make_delivery()
            step = self._delivery.step(hurry=hurry)
        except BaseException as problem:
            # Trouble with the disk, a callback that calls sys.exit(), or a defect of ours: none of them may end
            # delivery for good.  "exhausted", because a flush must not wait for what may not end.
            self._complain(problem, exc_info=not isinstance(problem, OutboxError))
            step = Step("failed", seconds=_TROUBLE_WAIT, exhausted=True)
        self._sender.note(step)
        return step

    def _wait_after(self, step: Step) -> None:
        if step.progress or self.stopping:
            return
        if step.kind != "empty":
            self._arm(_NEVER)  # new events change nothing: wait for the time, a flush or the end
            if self._hurry or self.stopping:
                return
        self._clock.wait(self.event, _LOOK if step.seconds is None else min(step.seconds, 3600.0))

    def _fill(self) -> bool:
        """Wait until the next batch is full, for `upload_interval` at most; False to look again.

        Nothing is waited for while a flush is on.
        """
        end = None
        while not self.stopping:
            try:
                pending = self._outbox.pending()
            except OutboxError:
                return True  # the step meets the same trouble and reports it
            missing = self._config.upload_size - pending
            now = self._clock.boot()
            end = now + self._config.upload_interval if end is None else end
            if pending == 0 or missing <= 0 or self._flush_to or now >= end:
                return True
            self._arm(missing)
            if not self._flush_to and not self.stopping:
                self._clock.wait(self.event, end - now)
        return False

    def _arm(self, events: int) -> None:
        self.event.clear()
        self.appended = 0
        self.wake_at = events

    def _complain(self, problem: BaseException, *, exc_info: bool) -> None:
        times = self._trouble.tick()
        if times:
            log.error("delivery is held up (%d times): %s", times, problem, exc_info=exc_info)
