"""`olmo-jax serve`: loads a model, opens the port, and leaves only when what runs is done."""

import asyncio
import logging
import resource
import signal
import socket
import time
from types import FrameType
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from olmo_jax.convert.load import load
from olmo_jax.errors import UserError
from olmo_jax.generate.chat import load_text_files
from olmo_jax.generate.driver import Driver
from olmo_jax.generate.engine import Engine, Request
from olmo_jax.generate.server import Server

LOCAL, LOCAL_NAMES = ("127.0.0.1", "::1", "localhost"), ["127.0.0.1", "[::1]", "localhost"]
CONNECTIONS = 2048
SILENT_SECONDS = 30
# Seconds that clients have to take what is ready for them, when the server leaves.
_LAST_SECONDS = 10


class WebServer(uvicorn.Server):
    """Runs a `Server`; finishes what was accepted before it leaves, refusing more meanwhile."""

    def __init__(self, server: Server, host: str):
        names = LOCAL_NAMES if host in LOCAL else None
        config = uvicorn.Config(
            server.app(names),
            log_level="error",  # what strangers send is no news
            access_log=False,
            server_header=False,
            http="h11",
            ws="none",
            limit_concurrency=CONNECTIONS,
        )
        super().__init__(config)
        self._server = server
        # Of each connection: its last request, and since when that has been answered.
        self._silent_since: dict[H11Protocol, tuple[Any, float]] = {}
        server.on_failure = self.leave

    def leave(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.force_exit:  # each request that is broken off now would print a traceback
            logging.disable()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second. Closes connections that have not brought a request, or not another:
        uvicorn itself has patience without end with half a request, and so many would keep all
        others out."""
        if counter % 10 == 0:
            now, before = time.monotonic(), self._silent_since
            self._silent_since = {}
            for connection in cast(list[H11Protocol], list(self.server_state.connections)):
                cycle = connection.cycle
                last, since = before.get(connection, (cycle, now))
                if last is not cycle or not (cycle is None or cycle.response_complete):
                    since = now
                self._silent_since[connection] = cycle, since
                if now - since > SILENT_SECONDS:
                    connection.transport.close()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._server.leaving = True
        driver = self._server.driver
        while driver.open and driver.failure is None and not self.force_exit:
            await asyncio.sleep(0.05)
        self.config.timeout_graceful_shutdown = _LAST_SECONDS
        await super().shutdown(sockets)


def serve(
    path: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    slots: int = 16,
    max_length: int | None = None,
    queue: int = 256,
    int8: bool = False,
) -> None:
    """Serves a model until SIGTERM or SIGINT; returns when what was accepted is finished.

    slots: texts that are made at once; queue: those that may wait; int8: as `Engine`'s. Raises
    UserError.
    """
    if queue < 0:
        raise UserError(f"queue = {queue}: it must be 0 or more")
    listener = bound(host, port)  # before the model is loaded: it may take minutes
    text = load_text_files(path)
    engine = Engine(load(path), slots=slots, max_length=max_length, int8=int8)
    _warm_up(engine, slots)
    server = Server(path.rstrip("/"), Driver(engine, slots + queue), text)
    # uvicorn sends itself the signal that ended it, once it has put back what was set before.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    _allow_files(CONNECTIONS + 256)
    listener.listen(CONNECTIONS)  # whoever reads the line may come
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    print(
        f"serving {server.name} at {address} ({slots} slots, at most {engine.max_length} tokens "
        f"each); the OpenAI API is at {address}/v1; Ctrl-C finishes what runs",
        flush=True,
    )
    web = WebServer(server, host)
    web.run(sockets=[listener])
    if web.force_exit:  # Ctrl-C, and again
        # uvicorn did not stop it then, and a thread that is inside XLA when Python ends aborts.
        server.driver.stop()
        raise KeyboardInterrupt
    if server.driver.failure is not None:
        raise server.driver.failure


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the port, and does not listen yet."""
    if not 0 <= port < 2**16:  # or the system takes what is left of it
        raise UserError(f"port = {port}: it must be from 0 (any that is free) to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host={host} --port={port}: {reason}; give another (--port=0 takes any that is free)"
        ) from None
    return listener


def _warm_up(engine: Engine, slots: int) -> None:
    """Compiles what the first requests would wait for, and finds out whether it all fits."""
    for _ in range(slots + 5):  # filled in together: many, four, and one
        engine.submit(Request((0,), min(16, engine.max_length - 1)))
    while engine.busy:
        engine.step()
    engine.tokens = engine.prompt_tokens = 0


def _allow_files(number: int) -> None:
    """Each connection is an open file, of which many systems allow 1024 unless asked."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number:
        wanted = number if most == resource.RLIM_INFINITY else min(number, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
