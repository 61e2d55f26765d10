"""`olmo-jax inspect`: a look inside a model at work on a text."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from olmo_jax.errors import UserError


def inspect(
    model: Annotated[
        str, Argument(help="A run folder, a checkpoint, or anything that convert reads.")
    ],
    text: Annotated[str | None, Option("--text", help="The text to look at.")] = None,
    file: Annotated[str | None, Option("--file", help="Instead: a file that holds it.")] = None,
    out: Annotated[
        str | None,
        Option("--out", help="x.npz for every array, x.html for a page to read."),
    ] = None,
    top: Annotated[int, Option("--top", help="So many alternatives for each token.")] = 5,
    activations: Annotated[
        list[str] | None,
        Option(
            "--activations",
            help="A module whose output the .npz keeps: embed, layers.0, layers.*.attention, "
            "layers.*.mlp.down, …, final_norm; * is any one part. Give it again for more. If "
            "none: the residual stream.",
        ),
    ] = None,
) -> None:
    """Show what a model does with a text: each token's loss and the likeliest alternatives, what
    the attention heads write, and the activations of named modules.

    ```
    olmo-jax inspect runs/demo --text="To be, or not to be"
    olmo-jax inspect runs/demo --file=README.md --out=page.html
    ```
    """
    if (text is None) == (file is None):
        raise UserError("give --text or --file, one of the two")
    path = None if out is None else Path(out)
    if path is not None and path.suffix not in (".npz", ".html"):
        raise UserError(f"--out={out}: give a name that ends in .npz or .html")
    if text is None:
        text = _read(str(file))
    from rich.console import Console

    from olmo_jax.eval.inspection import STREAM, inspect
    from olmo_jax.eval.inspection_show import page, table
    from olmo_jax.files import write_file

    found = inspect(model, text, top=top, activations=activations or STREAM)
    Console().print(table(found))
    if path is not None:
        if path.suffix == ".npz":
            found.save(path)
        else:
            write_file(path, page(found, model))
        print(f"{path}: written")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text: {error}") from None
