"""The command line: one thin command for each verb. Rooms do the work and are imported on use.

`olmo-jax --help` imports neither jax nor a room; a UserError becomes `error: …` and status 2.
"""

import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Context, Option

from olmo_jax.errors import UserError

if TYPE_CHECKING:
    from olmo_jax.train.config import RunConfig
    from olmo_jax.train.evaluate import Evaluation

STATUS_USER_ERROR, STATUS_INTERRUPTED = 2, 130

app = typer.Typer(
    name="olmo-jax",
    help="Train, study and hand on fully open language models (OLMo) in JAX.",
    epilog="Start with: olmo-jax train --gin_file=configs/demo.gin",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
data = typer.Typer(
    help="Make tokenizers and token files; look at training instances.", no_args_is_help=True
)
app.add_typer(data, name="data")

# `--gin.Name.field=value` is an unknown option to typer; `_bindings` reads what is left over.
_GIN = {"ignore_unknown_options": True, "allow_extra_args": True}

GinFiles = Annotated[
    list[str] | None,
    Option(
        "--gin_file", metavar="FILE", help="A gin file; give it again for more, the later one wins."
    ),
]
AllowGinImports = Annotated[
    bool, Option("--allow_gin_imports", help="Run `import` lines in gin files: they are code.")
]


def main() -> None:
    """The console entry `olmo-jax`: settings of the process first, then the command."""
    from olmo_jax.parallel.runtime import configure

    configure()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs a command line and returns its exit status; prints errors, without a traceback."""
    try:
        status = app(list(arguments), prog_name="olmo-jax", standalone_mode=False)
        sys.stdout.flush()
        return int(status or 0)
    except UserError as error:
        _print_error(str(error))
        return STATUS_USER_ERROR
    except typer.TyperException as error:  # options and arguments that typer refuses
        command = getattr(getattr(error, "ctx", None), "command_path", "olmo-jax")
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        _print_error(f"{message}; see {command} --help")
        return STATUS_USER_ERROR
    except (KeyboardInterrupt, typer.Abort):
        return STATUS_INTERRUPTED
    except BrokenPipeError:  # the reader has left, as in `olmo-jax models | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"olmo-jax {installed('olmo-jax')}")
        raise typer.Exit()


@app.command(context_settings=_GIN)
def train(
    context: Context,
    gin_file: GinFiles = None,
    dry_run: Annotated[
        bool, Option("--dry_run", help="Print configuration, size and plan, and leave.")
    ] = False,
    allow_gin_imports: AllowGinImports = False,
) -> None:
    """Train a model, or go on with a run from its newest checkpoint.

    Any value of the configuration can be given as --gin.Name.field=value; Name is Model, Optimizer,
    Schedule, Data, Train, Checkpoint or Mesh. --dry_run prints all of them. Status 75: SIGTERM came
    and the state was saved; the same command goes on.

    ```
    olmo-jax train --gin_file=configs/demo.gin
    olmo-jax train --gin_file=configs/demo.gin --gin.Optimizer.learning_rate=0.02 --dry_run
    ```
    """
    from olmo_jax.config import load_config, to_gin

    config = load_config(gin_file or [], _bindings(context, context.args), allow_gin_imports)
    if dry_run:
        from olmo_jax.train.dry_run import describe

        print(to_gin(config), describe(config), sep="\n")
        return
    from olmo_jax.train.loop import train

    from olmo_jax.report.report import write_report

    status = train(config, to_gin(config), evaluators=_samples(config))
    print(f"report: {write_report(config.train.run_dir)}")
    raise typer.Exit(status)


@app.command()
def fork(
    run: Annotated[str, Argument(help="The run folder to start from.")],
    new_run: Annotated[str, Argument(help="The new run folder.")],
    step: Annotated[
        int | None, Option("--step", help="Its checkpoint; the newest if none.")
    ] = None,
) -> None:
    """Start a new run from a checkpoint of another, to go on with another configuration.

    ```
    olmo-jax fork runs/demo runs/slow --step=1000
    olmo-jax train --gin_file=configs/demo.gin --gin.Train.run_dir=runs/slow
    ```
    """
    from olmo_jax.train.resume import fork

    step = fork(run, new_run, step)
    print(f"{new_run} starts at step {step}; train with --gin.Train.run_dir={new_run}")


@app.command()
def convert(
    source: Annotated[
        str, Argument(help="A run folder, one of its checkpoints, or a transformers folder.")
    ],
    target: Annotated[str, Argument(help="The new folder.")],
    to: Annotated[
        Literal["hf"], Option("--to", help="hf: what PyTorch's transformers loads.")
    ] = "hf",
    dtype: Annotated[
        Literal["float32", "bfloat16"], Option("--dtype", help="Type of the written weights.")
    ] = "float32",
    step: Annotated[
        int | None, Option("--step", help="A run's checkpoint; the newest if none.")
    ] = None,
) -> None:
    """Write a model as a folder for another program.

    ```
    olmo-jax convert runs/demo runs/demo/hf --to=hf
    ```
    """
    from olmo_jax.convert.export import convert

    with _progress("writing") as progress:
        convert(source, target, to, dtype=dtype, step=step, progress=progress)
    print(f"{target}: written; AutoModelForCausalLM.from_pretrained({target!r}) loads it")


@app.command()
def generate(
    model: Annotated[
        str, Argument(help="A run folder, one of its checkpoints, or a transformers folder.")
    ],
    prompt: Annotated[str, Option("--prompt", help="The text to go on from.")] = "",
    max_tokens: Annotated[int, Option("--max_tokens", help="At most so many tokens.")] = 100,
    temperature: Annotated[
        float, Option("--temperature", help="0 takes the likeliest token each time.")
    ] = 0.8,
    top_k: Annotated[int | None, Option("--top_k", help="Only the K likeliest tokens.")] = None,
    top_p: Annotated[
        float, Option("--top_p", help="Only the likeliest tokens that reach this probability.")
    ] = 1.0,
    seed: Annotated[int, Option("--seed", help="The same seed gives the same text.")] = 0,
) -> None:
    """Let a model continue a text, on stdout as it comes; tokens/s at the end, on stderr.

    ```
    olmo-jax generate runs/demo --prompt="**MACBETH**" --max_tokens=200
    ```
    """
    from olmo_jax.convert.load import load, load_tokenizer
    from olmo_jax.generate import generate_text

    tokenizer = load_tokenizer(model)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    pieces = generate_text(load(model), tokenizer, prompt, max_tokens, **options)
    print(prompt, end="", flush=True)
    text, start = [], 0.0
    for piece in pieces:
        start = start or time.perf_counter()  # the first piece has waited for compilation
        text.append(piece)
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - start
    print()
    n = len(tokenizer.encode("".join(text)).ids)
    print(f"{n} tokens, {max(0, n - 1) / seconds:,.0f} tokens/s after the first", file=sys.stderr)


@app.command()
def report(
    run: Annotated[str, Argument(help="A run folder.")],
    baselines: Annotated[
        str | None,
        Option("--baselines", help='JSON of others\' bits per byte, {"name": 2.3}; kept in RUN.'),
    ] = None,
) -> None:
    """Write a run's page: plots, samples, configuration, environment, data.

    ```
    olmo-jax report runs/demo
    ```
    """
    from olmo_jax.report.report import write_report

    if baselines:
        from olmo_jax.data.token_files import write_atomically

        path = Path(run) / "data.json"
        kept = _read_json(path) | {"baselines": _read_json(Path(baselines))}
        write_atomically(path, (json.dumps(kept, indent=2) + "\n").encode())
    print(write_report(run))


@app.command()
def models() -> None:
    """List the released models that Model.preset knows, with their sizes.

    ```
    olmo-jax models
    ```
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from olmo_jax.model.presets import PRESETS

    table = Table("preset", box=SIMPLE_HEAD)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("context", justify="right")
    table.add_column("")
    for name, preset in PRESETS.items():
        model = preset()
        about = (preset.__doc__ or "").splitlines()[0]
        table.add_row(name, f"{model.parameter_count():,}", f"{model.context_length:,}", about)
    Console().print(table)


# --- data ---------------------------------------------------------------------------------------

Documents = Annotated[list[str], Argument(help="Documents as JSONL, also .gz or .zst.")]


@data.command("tokenizer")
def data_tokenizer(
    files: Documents,
    out: Annotated[str, Option("--out", help="The tokenizer.json to write.")],
    vocab_size: Annotated[int, Option("--vocab_size", help="Entries of the vocabulary.")],
) -> None:
    """Train a byte-level BPE tokenizer on documents.

    ```
    olmo-jax data tokenizer train.jsonl --out=tokenizer.json --vocab_size=2048
    ```
    """
    from olmo_jax.data.tokenizer import train_tokenizer

    with _progress("reading") as progress:
        tokenizer = train_tokenizer(files, out, vocab_size, progress)
    print(f"{out}: {tokenizer.get_vocab_size():,} tokens")


@data.command("tokenize")
def data_tokenize(
    files: Documents,
    out: Annotated[str, Option("--out", help="A new folder for the token files.")],
    tokenizer: Annotated[str, Option("--tokenizer", help="A tokenizer.json or its folder.")],
    eos_token: Annotated[
        str, Option("--eos_token", help="The token that ends each document.")
    ] = "<|endoftext|>",
    keep_whitespace: Annotated[
        bool, Option("--keep_whitespace", help="Do not strip documents.")
    ] = False,
    max_tokens_per_file: Annotated[
        int, Option("--max_tokens_per_file", help="Start a new file beyond this.")
    ] = 1 << 26,
) -> None:
    """Turn documents into token files (.npy, with their documents in .csv.gz).

    ```
    olmo-jax data tokenize train.jsonl --out=data/train --tokenizer=tokenizer.json
    ```
    """
    from olmo_jax.data.tokenize import tokenize_documents

    with _progress("tokenizing") as progress:
        done = tokenize_documents(
            files,
            out,
            tokenizer,
            eos_token=eos_token,
            strip=not keep_whitespace,
            max_tokens_per_file=max_tokens_per_file,
            progress=progress,
        )
    print(
        f"{out}: {done.tokens:,} tokens of {done.documents:,} documents in {len(done.files)} files"
        f" of {done.files[0].dtype} ({done.skipped:,} empty documents skipped); "
        f"Data.eos_token_id = {done.eos_token_id}"
    )


@data.command("inspect", context_settings=_GIN)
def data_inspect(
    context: Context,
    what: Annotated[
        list[str], Argument(metavar="[RUN] N", help="A run folder (or --gin_file), and which.")
    ],
    gin_file: GinFiles = None,
    tokenizer: Annotated[
        str | None, Option("--tokenizer", help="Instead of the run's Train.tokenizer.")
    ] = None,
    allow_gin_imports: AllowGinImports = False,
) -> None:
    """Print the N-th instance that training consumes (from 0) as text, with its documents.

    ```
    olmo-jax data inspect runs/demo 0
    olmo-jax data inspect --gin_file=configs/demo.gin 41
    ```
    """
    from olmo_jax.data import open_dataset
    from olmo_jax.data.inspect import describe_instance

    options = [argument for argument in (*what, *context.args) if argument.startswith("-")]
    *run, n = [argument for argument in what if argument not in options] or [""]
    if not n.isdecimal() or len(run) != (not gin_file):
        raise UserError(
            f"data inspect {' '.join([*run, n])}: give a run folder and a number, or --gin_file "
            "and a number: olmo-jax data inspect runs/demo 0"
        )
    if run:
        _bindings(context, options, allowed=False)
        config, own = _run_config(run[0]), os.path.join(run[0], "tokenizer.json")
    else:
        from olmo_jax.config import load_config

        config = load_config(gin_file or [], _bindings(context, options), allow_gin_imports)
        own = config.train.tokenizer or ""
    if not tokenizer and not own:
        raise UserError("Train.tokenizer is not given: give it, or --tokenizer=tokenizer.json")
    dataset = open_dataset(config.data, config.model.vocab_size)
    print(describe_instance(dataset, int(n), tokenizer or own))


# --- what commands share ------------------------------------------------------------------------


class Samples:
    """The loop's evaluator that lets the model continue `Train.sample_prompts`."""

    def __init__(self, prompts: Sequence[str], max_tokens: int, tokenizer_path: str):
        from olmo_jax.data.tokenizer import load_tokenizer

        self.prompts, self.max_tokens = prompts, max_tokens
        self.tokenizer = load_tokenizer(tokenizer_path)

    def __call__(self, model, step: int) -> "Evaluation":
        from olmo_jax.generate import generate_text
        from olmo_jax.train.evaluate import Evaluation

        options = {"temperature": 0.8, "top_p": 0.95, "seed": 0}
        texts = [
            "".join(generate_text(model, self.tokenizer, prompt, self.max_tokens, **options))
            for prompt in self.prompts
        ]
        return Evaluation({}, list(zip(self.prompts, texts, strict=True)))


def _samples(config: "RunConfig") -> list[Samples]:
    train = config.train
    if not train.sample_prompts:
        return []
    if train.tokenizer is None:
        raise UserError("Train.sample_prompts is given and Train.tokenizer is not: give both")
    return [Samples(train.sample_prompts, train.sample_tokens, train.tokenizer)]


def _run_config(run: str) -> "RunConfig":
    """The configuration that a run folder keeps."""
    from olmo_jax.train.config import RunConfig

    path = Path(run) / "config.json"
    saved = _read_json(path)
    try:
        return RunConfig.from_json(saved)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f'{path}: is not a JSON object, {{"name": …}}')
    return content


def _bindings(context: Context, arguments: Sequence[str], allowed: bool = True) -> list[str]:
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
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for the (bytes done, of how many) that rooms report."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)
    for line in message.splitlines():
        console.print(Text.assemble(("error: ", "bold red"), line))
