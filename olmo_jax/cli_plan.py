"""`olmo-jax plan`: what a run would need and reach on a machine that is not there."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Context, Option

from olmo_jax.cli_shared import AllowGinImports, GinFiles, bindings
from olmo_jax.errors import UserError

if TYPE_CHECKING:
    from olmo_jax.plan.roofline import Outlook
    from olmo_jax.plan.run import Request


def plan(
    context: Context,
    words: Annotated[
        list[str] | None, Argument(metavar="[search]", help="Try meshes, micro-batches and remat.")
    ] = None,
    gin_file: GinFiles = None,
    target: Annotated[
        str, Option("--target", help="v5p-128, v6e-256, 2xv5e-256, tpu7x-64, h100-64, …")
    ] = "",
    mesh: Annotated[
        str | None, Option("--mesh", help="Such as fsdp=64 or data=4,fsdp=-1; others are 1.")
    ] = None,
    batch: Annotated[int | None, Option("--batch", help="Instances a step.")] = None,
    micro: Annotated[
        int | None, Option("--micro", help="Instances a pass (Train.micro_batch_size); 0: all.")
    ] = None,
    remat: Annotated[str | None, Option("--remat", help="Model.remat.")] = None,
    compare: Annotated[
        tuple[str, str] | None,
        Option("--compare", metavar="A B", help="Two gin files, or two targets, side by side."),
    ] = None,
    tokens: Annotated[
        float | None, Option("--tokens", help="Tokens to train on, 5e12; the recipe's if none.")
    ] = None,
    pue: Annotated[
        float | None, Option("--pue", help="Power of the building a watt of machine.")
    ] = None,
    grid: Annotated[
        float | None, Option("--grid_gco2_per_kwh", help="Grams of CO2e a kWh of your grid.")
    ] = None,
    json_file: Annotated[str | None, Option("--json", help="Also write all of it here.")] = None,
    html_file: Annotated[str | None, Option("--html", help="Also write a page here.")] = None,
    processes: Annotated[
        int, Option("--processes", help="Compilers that search runs at once.")
    ] = 2,
    no_cache: Annotated[
        bool, Option("--no_cache", help="Compile also what was compiled before.")
    ] = False,
    allow_gin_imports: AllowGinImports = False,
) -> None:
    """Compile the training step for a machine that is not there: does it fit, what bounds it?

    The real compiler runs (the extra `aot` brings it; no device is needed). Memory a
    device, FLOPs, bytes over each mesh axis, the roofline bound of a step, and from it tokens/s,
    days, energy and carbon. --gin.Name.field=value as in train.

    ```
    olmo-jax plan --gin_file=configs/olmo2/1b.gin --target=v5e-16 --mesh=fsdp=16 --batch=16
    olmo-jax plan search --gin_file=configs/olmo3/7b.gin --target=v5p-128 --batch=128
    olmo-jax plan --gin_file=configs/olmo2/7b.gin --batch=256 --compare v6e-256 h100-64
    ```
    """
    from olmo_jax.plan.targets import prepare_process

    prepare_process()  # before anything imports jax
    from rich.console import Console

    from olmo_jax.plan.run import Request
    from olmo_jax.plan.show import assumptions, ranking, terminal_table

    words = words or []  # `search`, and the --gin.… that typer does not know
    searching = words[:1] == ["search"]
    gin = bindings(context, [*words[searching:], *context.args])

    def request(files: Sequence[str], target: str, name: str) -> Request:
        from olmo_jax.plan.roofline import GRID_GCO2_PER_KWH, PUE

        return Request(
            _config(files, gin, allow_gin_imports),
            target,
            name,
            mesh,
            batch,
            micro,
            remat,
            int(tokens) if tokens else None,
            PUE if pue is None else pue,
            GRID_GCO2_PER_KWH if grid is None else grid,
            use_cache=not no_cache,
        )

    console = Console()
    if searching:
        from olmo_jax.plan.search import search

        wanted = request(gin_file or [], _required(target), "")
        found = search(wanted, processes)
        outlooks = [o for _, o in found.done]
        console.print(ranking(outlooks, [what for what, _ in found.done]))
        for what, why in found.refused:
            console.print(f"not possible: {what}: {why}", style="dim", highlight=False)
    else:
        outlooks = _carried_out(_requests(request, gin_file or [], target, compare))
        console.print(terminal_table(outlooks))
    if outlooks:
        console.print(assumptions(outlooks[0]), highlight=False)
    for note in dict.fromkeys(note for o in outlooks for note in o.notes):
        console.print(f"note: {note}", highlight=False)
    if json_file:
        content = json.dumps([o.as_json() for o in outlooks], indent=2) + "\n"
        _write(json_file, content)
    if html_file:
        from olmo_jax.plan.page import render

        _write(html_file, render(outlooks))


def _requests(request, gin_file: Sequence[str], target: str, compare) -> list["Request"]:
    """One request, or two to compare: gin files where both exist, else targets."""
    if compare is None:
        return [request(gin_file, _required(target), target)]
    if all(name.endswith(".gin") for name in compare):
        return [request([*gin_file, name], _required(target), Path(name).stem) for name in compare]
    return [request(gin_file, name, name) for name in compare]


def _carried_out(requests: Sequence["Request"]) -> list["Outlook"]:
    from rich.console import Console

    from olmo_jax.plan.run import carry_out

    outlooks, console = [], Console(stderr=True)
    for one in requests:
        with console.status(f"compiling for {one.target} (minutes for a large model on a TPU) …"):
            outlooks.append(carry_out(one))
    return outlooks


def _config(files: Sequence[str], gin: list[str], allow_imports: bool):
    from olmo_jax.config import load_config

    if not files:
        raise UserError("plan needs a configuration: give --gin_file=configs/….gin")
    # The recipes leave the token files to the user; nothing is read from them here.
    given = any(binding.startswith(("Data.paths", "Data.sources")) for binding in gin)
    run_of = [*([] if given else ["Data.paths=('unused',)"]), *gin]
    try:
        return load_config(files, run_of, allow_imports)
    except UserError:
        if given:
            raise
        return load_config(files, gin, allow_imports)  # a file with sources of its own


def _required(target: str) -> str:
    if not target:
        raise UserError("plan needs a machine: give --target=v5p-128, h100-64, …")
    return target


def _write(path: str, content: str) -> None:
    from olmo_jax.files import write_bytes

    try:
        write_bytes(Path(path), content.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    print(f"wrote {path}")
