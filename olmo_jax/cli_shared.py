"""What several commands need: options that they share, `--gin.…` arguments, a progress bar."""

import difflib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Context, Option

from olmo_jax.errors import UserError

if TYPE_CHECKING:
    from olmo_jax.train.config import RunConfig

# `--gin.Name.field=value` is an unknown option to typer; `bindings` reads what is left over.
GIN = {"ignore_unknown_options": True, "allow_extra_args": True}

GinFiles = Annotated[
    list[str] | None,
    Option(
        "--gin_file", metavar="FILE", help="A gin file; give it again for more, the later one wins."
    ),
]
AllowGinImports = Annotated[
    bool, Option("--allow_gin_imports", help="Run `import` lines in gin files: they are code.")
]


def run_config(run: str) -> "RunConfig":
    """The configuration that a run folder keeps."""
    from olmo_jax.storage import location
    from olmo_jax.train.config import RunConfig

    path = location(run) / "config.json"
    saved = read_json(path)
    try:
        return RunConfig.from_json(saved)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def rebound_config(run: str, given: list[str], allow_imports: bool) -> "RunConfig":
    """The same with bindings on top of it, such as where its token files have moved."""
    from olmo_jax.config import load_config
    from olmo_jax.storage import is_remote, location

    path = location(run) / "config.gin"
    if not is_remote(path):
        return load_config([str(path)], given, allow_imports)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "config.gin"
        copy.write_bytes(path.read_bytes())
        return load_config([str(copy)], given, allow_imports)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f'{path}: is not a JSON object, {{"name": …}}')
    return content


def bindings(context: Context, arguments: Sequence[str], allowed: bool = True) -> list[str]:
    """The `--gin.…` among the arguments that typer does not know; all others are refused."""
    known = [name for parameter in context.command.params for name in parameter.opts]
    known = [name for name in known if name.startswith("--")]
    known += ["--help", *["--gin.Name.field=value"][:allowed]]
    bindings = []
    for argument in arguments:
        if argument.startswith("--gin.") and allowed:
            bindings.append(argument.removeprefix("--gin."))
            continue
        near = difflib.get_close_matches(argument.partition("=")[0], known, n=1)
        hint = f", did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
        raise UserError(f"unknown option {argument}{hint}")
    return bindings


@contextmanager
def progress(what: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for the (done, of how many) that rooms report, in bytes or another unit."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    count: tuple[ProgressColumn, ...] = (MofNCompleteColumn(), TextColumn(unit))
    if unit == "bytes":
        count = (DownloadColumn(),)
    columns = (TextColumn(what), BarColumn(), *count, TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_error(message: str) -> None:
    """A line on stderr that begins with a red "error: "."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)
    for line in message.splitlines():
        console.print(Text.assemble(("error: ", "bold red"), line))
