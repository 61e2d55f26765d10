"""The web application: OpenAI's API for one model, a chat page, health and metrics.

Requests are checked here and turned into the engine's; driver.py runs them, answers.py makes
answers of what comes.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from olmo_jax.errors import UserError
from olmo_jax.generate import engine
from olmo_jax.generate.answers import Answer, Choice
from olmo_jax.generate.chat import TextFiles
from olmo_jax.generate.driver import Driver, Failed, Full
from olmo_jax.generate.metrics import Metrics
from olmo_jax.generate.openai_schema import Asked, ChatRequest, CompletionRequest
from olmo_jax.generate.sampling import Sampling
from olmo_jax.generate.text import encode_prompt
from olmo_jax.generate.web import (
    ApiError,
    Streamed,
    error_response,
    http_error,
    load_page,
    parsed,
    read_body,
    unexpected,
    unless_gone,
)

_COMPLETION_TOKENS = 16  # OpenAI's default


class Server:
    """One model on the web."""

    def __init__(
        self,
        name: str,
        driver: Driver,
        text: TextFiles,
    ):
        self.name, self.driver, self.text = name, driver, text
        self.metrics = Metrics(driver)
        self.leaving = False
        self.on_failure: Callable[[], None] = lambda: None
        """Called when the engine's thread has ended by an error."""
        self._started = int(time.time())

    def app(self, names: list[str] | None = None) -> Starlette:
        """names: hosts' names by which it may be called, so that no page of another site, whose
        name is made to lead here, can talk to it; None: any."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.driver.start(self.on_failure)
            yield
            await asyncio.to_thread(self.driver.stop)

        page, policy = load_page()
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}

        async def show_page(_: Request) -> Response:
            return HTMLResponse(page, headers=headers)

        return Starlette(
            routes=[
                Route("/", show_page),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat_completions, methods=["POST"]),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)],
            exception_handlers={HTTPException: http_error, Exception: unexpected},
            lifespan=lifespan,
        )

    # --- what is here -----------------------------------------------------------------------------

    async def _health(self, _: Request) -> Response:
        failed = self.driver.failure is not None
        status = "failed" if failed else "leaving" if self.leaving else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, http: Request) -> Response:
        if http.path_params["name"] != self.name:
            return error_response(self._unknown(http.path_params["name"]))
        return JSONResponse(self._card())

    def _card(self) -> dict:
        return {
            "id": self.name,
            "object": "model",
            "created": self._started,
            "owned_by": "olmo_jax",
            "max_model_len": self.driver.engine.max_length,
            "chat": self.text.chat_template is not None,
        }

    def _unknown(self, name: str) -> ApiError:
        message = f"there is no model {name[:60]!r} here: there is {self.name!r}"
        return ApiError(404, message, "model", "model_not_found")

    # --- text -------------------------------------------------------------------------------------

    async def _completions(self, http: Request) -> Response:
        return await self._counted(http, CompletionRequest)

    async def _chat_completions(self, http: Request) -> Response:
        return await self._counted(http, ChatRequest)

    async def _counted(self, http: Request, kind: type[Asked]) -> Response:
        start = time.perf_counter()
        try:
            response = await self._answer(http, kind, start)
        except ApiError as error:
            response = error_response(error)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it; the metrics tell of it
        except Failed:
            response = error_response(
                ApiError(500, "the model has failed: see the server's messages")
            )
        self.metrics.requests.labels(http.url.path, str(response.status_code)).inc()
        return response

    async def _answer(self, http: Request, kind: type[Asked], start: float) -> Response:
        if self.leaving:
            raise ApiError(503, "the server is being shut down", code="shutting_down")
        asked = parsed(await read_body(http), kind)
        if asked.model != self.name:
            raise self._unknown(asked.model)
        # Elsewhere, for a long prompt takes a second to encode.
        requests, heads = await asyncio.to_thread(self._requests, asked)
        try:
            job = self.driver.begin(requests)
        except Full:
            message = f"{self.driver.open} texts are being made or wait: try again later"
            raise ApiError(429, message, code="queue_full") from None
        choices = [
            Choice(self.text.tokenizer, request, asked.stops, head)
            for request, head in zip(requests, heads, strict=True)
        ]
        answer = Answer(
            "chat" if isinstance(asked, ChatRequest) else "completion",
            self.name,
            choices,
            job,
            # n texts from one prompt read it once.
            sum(len(request.prompt_ids) for request in requests[:: asked.n]),
            lambda: self.metrics.first_token.observe(time.perf_counter() - start),
        )

        def close() -> None:
            job.close()
            self.metrics.duration.observe(time.perf_counter() - start)

        if asked.stream:
            return Streamed(answer.chunks(asked.stream_options.include_usage), close)
        try:
            return JSONResponse(await unless_gone(http, answer.whole()))
        finally:
            close()

    def _requests(self, asked: Asked) -> tuple[list[engine.Request], list[str]]:
        """The engine's requests, n for each prompt, and the text that goes before each answer."""
        prompts: Sequence[str | list[int]]
        if isinstance(asked, ChatRequest):
            prompts, field = [self._conversation(asked)], "messages"
            most, default = asked.max_completion_tokens or asked.max_tokens, None
            logprobs, echo = asked.top_logprobs if asked.logprobs else None, False
        else:
            assert isinstance(asked, CompletionRequest)
            prompts, field = asked.prompts, "prompt"
            most, default = asked.max_tokens, _COMPLETION_TOKENS
            logprobs, echo = asked.logprobs, asked.echo
        if len(prompts) * asked.n > self.driver.most:
            number = f"{len(prompts)} prompts with n = {asked.n}"
            raise ApiError(400, f"{number}: at most {self.driver.most} texts are made at once", "n")
        sampling = Sampling(
            asked.temperature, asked.top_k, asked.top_p, asked.min_p, asked.repetition_penalty
        )
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        requests: list[engine.Request] = []
        heads = []
        for prompt in prompts:
            ids = self._ids(prompt) if isinstance(prompt, str) else prompt
            tokens = self._max_tokens(len(ids), most, default, field)
            for _ in range(asked.n):
                one = engine.Request(
                    tuple(ids), tokens, sampling, seed + len(requests), self.text.eos_ids, logprobs
                )
                try:
                    self.driver.engine.check(one)
                except UserError as error:
                    raise ApiError(400, str(error), field) from None
                requests.append(one)
            head = ""
            if echo:
                head = (
                    prompt if isinstance(prompt, str) else self.text.tokenizer.decode(prompt, False)
                )
            heads += [head] * asked.n
        return requests, heads

    def _ids(self, prompt: str) -> list[int]:
        eos_id = self.text.eos_ids[0] if self.text.eos_ids else None
        return encode_prompt(self.text.tokenizer, prompt, eos_id)

    def _conversation(self, asked: ChatRequest) -> list[int]:
        if self.text.chat_template is None:
            message = f"{self.name} has no chat template: ask /v1/completions"
            raise ApiError(400, message, "model")
        try:
            return self.text.chat_ids([message.plain() for message in asked.messages])
        except UserError as error:  # a template may ask for turns in turn, for one
            raise ApiError(400, str(error), "messages") from None

    def _max_tokens(self, n: int, most: int | None, default: int | None, field: str) -> int:
        """What a prompt of n tokens may be followed by: `most`, or if none up to the context's end
        and the default."""
        longest = self.driver.engine.max_length
        tokens = max(1, min(longest - n, default or longest)) if most is None else most
        if n + tokens > longest:
            message = (
                f"the {field} of {n} tokens and max_tokens = {tokens} are {n + tokens} together: "
                f"at most {longest} fit"
            )
            raise ApiError(400, message, field, "context_length_exceeded")
        return tokens
