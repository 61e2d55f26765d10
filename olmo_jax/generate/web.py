"""What the server needs of HTTP: bodies within limits, errors in OpenAI's form, streams that end
with their clients, the page with its policy. Nothing here knows of models.
"""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncGenerator, Callable, Coroutine
from importlib import resources
from typing import Any, TypeVar

import pydantic
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from olmo_jax.generate.openai_schema import error_body, fault

BODY_BYTES = 2 * 2**20  # 65,536 tokens of text are about 0.3 MB
BODY_SECONDS = 30

T = TypeVar("T")
M = TypeVar("M", bound=pydantic.BaseModel)


class ApiError(Exception):
    """A request that is not carried out: the status, and what OpenAI's error object holds."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def error_response(error: ApiError) -> Response:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    # What is left of a body that was not read would be taken for the next request.
    if error.status in (408, 413):
        headers["Connection"] = "close"
    body = error_body(str(error), kind, error.param, error.code)
    return JSONResponse(body, error.status, headers)


async def http_error(request: Request, error: Exception) -> Response:
    """No such address, no such method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail.lower()}"
    response = error_response(ApiError(error.status_code, message))
    response.headers.update(error.headers or {})
    return response


async def unexpected(_: Request, error: Exception) -> Response:
    """A fault of ours; its traceback goes to the log."""
    return error_response(ApiError(500, "an error of the server's: see its messages"))


async def read_body(request: Request) -> bytes:
    """A JSON body. Raises ApiError; ClientDisconnect when the client has gone."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another site may send any other type without the browser asking first.
        raise ApiError(415, f"content-type is {kind[:60]!r}: it must be application/json")
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= BODY_BYTES:
                    body += part
                elif size > 16 * BODY_BYTES:
                    break  # else read on: few clients hear an answer before all is sent
    except TimeoutError:
        raise ApiError(408, f"the body was not there within {BODY_SECONDS} s") from None
    if size > BODY_BYTES:
        raise ApiError(413, f"the body has more than {BODY_BYTES:,} bytes")
    return bytes(body)


def parsed(body: bytes, kind: type[M]) -> M:
    """Raises ApiError."""
    try:
        return kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise ApiError(400, *fault(error, kind)) from None


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; raises ClientDisconnect, and ends it, as soon as the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


class Streamed(StreamingResponse):
    """Server-sent events; calls `close` at the end, however it comes."""

    def __init__(self, chunks: AsyncGenerator[str, None], close: Callable[[], None]):
        # A proxy between here and the client must not collect what comes.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(chunks, headers=headers, media_type="text/event-stream")
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def load_page() -> tuple[str, str]:
    """The chat page, and the policy by which a browser runs nothing in it but its own script."""
    page = resources.files("olmo_jax.generate").joinpath("page.html").read_text("utf-8")

    def digest(tag: str) -> str:
        found = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert found is not None
        return base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()

    policy = (
        "default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; script-src 'sha256-{digest('script')}'; "
        f"style-src 'sha256-{digest('style')}'; img-src data:"
    )
    return page, policy
