"""`olmo-jax serve`: a model on the web, for OpenAI's clients and for people."""

from typing import Annotated

from typer import Option

from olmo_jax.cli_generate import Int8, Model
from olmo_jax.errors import UserError


def serve(
    model: Model,
    host: Annotated[
        str, Option("--host", help="Where to listen; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, Option("--port", help="0 takes any that is free.")] = 8000,
    slots: Annotated[int, Option("--slots", help="Texts that are made at once.")] = 16,
    queue: Annotated[
        int, Option("--queue", help="Texts that may wait for a slot; more are refused (429).")
    ] = 256,
    max_length: Annotated[
        int | None,
        Option("--max_length", help="Most tokens of prompt and text; the model's context if none."),
    ] = None,
    int8: Int8 = False,
) -> None:
    """Serve a model: OpenAI's API under /v1, a page to write with it at /, /health and /metrics.

    SIGTERM or Ctrl-C finishes the requests that are there, refuses others, and leaves with status
    0. Anyone who reaches the address may use it: there is no password.

    ```
    olmo-jax serve runs/demo --port=8000
    ```
    """
    try:
        from olmo_jax.generate.serve import serve
    except ModuleNotFoundError as error:
        if error.name not in ("prometheus_client", "starlette", "uvicorn"):
            raise
        raise UserError(f"serve needs {error.name}: pip install 'olmo-jax[serve]'") from None

    serve(
        model,
        host=host,
        port=port,
        slots=slots,
        queue=queue,
        max_length=max_length,
        int8=int8,
    )
