"""Between the web server's event loop and the engine, which one thread of its own drives.

Nothing here knows of HTTP or of text.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from olmo_jax.generate.engine import Engine, Event, Request


class Full(Exception):
    """As many requests wait as may."""


class Failed(Exception):
    """The engine has ended by an error; no request gets any more."""

    def __init__(self):
        super().__init__("the model has failed: see the server's messages")


class Job:
    """Requests that belong together: what comes of them, in one queue.

    Whoever begins a job closes it, whatever happens; the slots of what has not ended are then free.
    """

    def __init__(self, driver: "Driver", requests: Sequence[Request]):
        self._driver = driver
        self._news: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()
        self._left = set(range(len(requests)))
        for i, request in enumerate(requests):
            driver.do(partial(driver.submit, self, i, request))

    async def next(self) -> tuple[int, Event]:
        """The index of a request, and what is new of it. Raises Failed, or what `submit` raises."""
        news = await self._news.get()
        if isinstance(news, Exception):
            raise news
        return news

    def end(self, i: int) -> None:
        """No more of a request."""
        if i in self._left:
            self._left.discard(i)
            self._driver.open -= 1
            self._driver.do(partial(self._driver.cancel, self, i))

    def close(self) -> None:
        for i in list(self._left):
            self.end(i)

    def put(self, news: tuple[int, Event] | Exception) -> None:
        """Called in the event loop."""
        self._news.put_nowait(news)
        # Counted off here and not when it is read: a client that reads slowly holds up nobody.
        if isinstance(news, tuple) and news[1].finish and news[0] in self._left:
            self._left.discard(news[0])
            self._driver.open -= 1


class Driver:
    """The engine's thread. All but `do` and the thread's own part is the event loop's."""

    def __init__(self, engine: Engine, most: int):
        """most: requests that may run or wait at once."""
        self.engine, self.most = engine, most
        self.open = 0
        """Requests that run or wait."""
        self.failure: BaseException | None = None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # The thread's:
        self._jobs: dict[int, tuple[Job, int]] = {}
        self._ids: dict[tuple[Job, int], int] = {}

    def start(self, on_failure: Callable[[], None]) -> None:
        """In the event loop."""
        self._loop, self._on_failure = asyncio.get_running_loop(), on_failure
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its present step."""
        self._commands.put(None)
        self._thread.join()

    def begin(self, requests: Sequence[Request]) -> Job:
        """Puts requests in line. Raises Full or Failed."""
        if self.failure is not None:
            raise Failed()
        if self.open + len(requests) > self.most:
            raise Full
        self.open += len(requests)
        return Job(self, requests)

    def do(self, command: Callable[[], None]) -> None:
        """Has the thread call it between two steps."""
        self._commands.put(command)

    # --- in the thread ----------------------------------------------------------------------------

    def submit(self, job: Job, i: int, request: Request) -> None:
        try:
            if self.failure is not None:
                raise Failed()
            id = self.engine.submit(request)
        except Exception as error:
            self._tell(job.put, error)
            return
        self._jobs[id] = job, i
        self._ids[job, i] = id

    def cancel(self, job: Job, i: int) -> None:
        if (id := self._ids.pop((job, i), None)) is not None:
            del self._jobs[id]
            self.engine.cancel(id)

    def _run(self) -> None:
        try:
            while True:
                while not (self.engine.busy and self._commands.empty()):
                    if (command := self._commands.get()) is None:
                        return
                    command()
                events = [(*self._jobs[event.id], event) for event in self.engine.step()]
                for job, i, event in events:
                    if event.finish:
                        del self._jobs[event.id], self._ids[job, i]
                self._tell(_deliver, events)
        except BaseException as error:
            self.failure = error
            for job in {job for job, _ in self._jobs.values()}:
                self._tell(job.put, Failed())
            self._tell(self._on_failure)
            while (command := self._commands.get()) is not None:
                command()

    def _tell(self, call: Callable[..., None], *arguments: object) -> None:
        """Has the event loop call it."""
        with suppress(RuntimeError):  # it has ended: whoever pressed Ctrl-C twice did not wait
            self._loop.call_soon_threadsafe(call, *arguments)


def _deliver(events: list[tuple[Job, int, Event]]) -> None:
    for job, i, event in events:
        job.put((i, event))
