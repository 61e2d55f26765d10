"""The command line: one thin command for each verb. Rooms do the work and are imported on use.

`olmo-jax --help` imports neither jax nor a room; a UserError becomes `error: …` and status 2.
"""

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Context, Option

from olmo_jax import (
    cli_data,
    cli_eval,
    cli_generate,
    cli_inspect,
    cli_launch,
    cli_plan,
    cli_serve,
)
from olmo_jax.cli_shared import GIN, AllowGinImports, GinFiles, bindings, progress, read_json
from olmo_jax.errors import UserError

if TYPE_CHECKING:
    from olmo_jax.train.config import RunConfig
    from olmo_jax.train.evaluate import Evaluation, Evaluator

STATUS_USER_ERROR, STATUS_INTERRUPTED = 2, 130

app = typer.Typer(
    name="olmo-jax",
    help="Train, study, evaluate and hand on fully open language models (OLMo, OLMoE, Pythia) in "
    "JAX.",
    epilog="Start with: olmo-jax train --gin_file=configs/demo.gin",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_launch.app, name="launch")
app.command(context_settings=GIN)(cli_plan.plan)
app.command()(cli_generate.generate)
app.command()(cli_generate.chat)
app.command()(cli_serve.serve)
app.command("eval")(cli_eval.evaluate)
app.command()(cli_inspect.inspect)


def main() -> None:
    """The console entry `olmo-jax`: settings of the process first, then the command."""
    from olmo_jax.parallel.processes import leave
    from olmo_jax.parallel.runtime import configure

    configure()
    leave(run(sys.argv[1:]))


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
    except Exception as error:
        from olmo_jax import storage

        if not storage.is_of_a_bucket(error):
            raise
        _print_error(f"the bucket's server: {storage.reason(error)}")
        return STATUS_USER_ERROR


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"olmo-jax {installed('olmo-jax')}")
        raise typer.Exit()


@app.command(context_settings=GIN)
def train(
    context: Context,
    gin_file: GinFiles = None,
    dry_run: Annotated[
        bool, Option("--dry_run", help="Print configuration, size and plan, and leave.")
    ] = False,
    profile_steps: Annotated[
        str | None,
        Option("--profile_steps", help="Steps to profile into the run folder, as 10:15."),
    ] = None,
    coordinator: Annotated[
        str | None, Option("--coordinator", help="HOST:PORT of process 0, of several processes.")
    ] = None,
    processes: Annotated[int | None, Option("--processes", help="Their number.")] = None,
    process_id: Annotated[
        int | None, Option("--process_id", help="Which of them this is, from 0.")
    ] = None,
    start_timeout: Annotated[
        int | None, Option("--start_timeout", help="Seconds within which all must meet; 300.")
    ] = None,
    allow_gin_imports: AllowGinImports = False,
) -> None:
    """Train a model, or go on with a run from its newest checkpoint.

    Any value of the configuration can be given as --gin.Name.field=value; Name is Model, Optimizer,
    Schedule, Data, Train, Checkpoint or Mesh. --dry_run prints all of them. Status 75: SIGTERM came
    and the state was saved; 76: another process died, or a hang was ended; the same command goes
    on.

    Each host runs the same command. TPU hosts, SLURM tasks and GKE pods find one another; others
    need --coordinator, --processes and --process_id.

    ```
    olmo-jax train --gin_file=configs/demo.gin
    olmo-jax train --gin_file=configs/demo.gin --gin.Optimizer.learning_rate=0.02 --dry_run
    ```
    """
    from olmo_jax.config import load_config, to_gin
    from olmo_jax.parallel.processes import initialize

    steps = _steps(profile_steps)
    config = load_config(gin_file or [], bindings(context, context.args), allow_gin_imports)
    if dry_run:
        from olmo_jax.train.dry_run import describe

        print(to_gin(config), describe(config), sep="\n")
        return
    initialize(coordinator, processes, process_id, start_timeout)
    from olmo_jax.train.loop import train

    at_end = partial(_report, config.train.run_dir)
    evaluators: list[Evaluator] = [*_samples(config), *_tasks(config)]
    raise typer.Exit(train(config, to_gin(config), evaluators, at_end, steps))


def _steps(text: str | None) -> tuple[int, int] | None:
    """10:15 as (10, 15)."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UserError(
            f"--profile_steps={text}: give the first and the last step, as 10:15 (the first is 1)"
        )
    return int(first), int(last)


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
    from olmo_jax.checkpoint.fork import fork

    step = fork(run, new_run, step)
    print(f"{new_run} starts at step {step}; train with --gin.Train.run_dir={new_run}")


@app.command()
def convert(
    paths: Annotated[
        list[str],
        Argument(
            metavar="SOURCE TARGET",
            help="A run folder, one of its checkpoints, another program's folder, a hub id or a "
            "gs://, s3:// or http(s):// address; and the new folder. With --average more sources.",
        ),
    ],
    to: Annotated[
        str,
        Option(
            "--to",
            help="hf (PyTorch's transformers), olmo, olmo_core (the original programs), or orbax "
            "(this program).",
        ),
    ] = "hf",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        Option(
            "--dtype",
            help="Type of the written weights. If none, each keeps the type in which it is stored: "
            "float32 in our own runs, and another program's weights keep their bytes.",
        ),
    ] = None,
    step: Annotated[
        int | None, Option("--step", help="A run's checkpoint; the newest if none.")
    ] = None,
    revision: Annotated[
        str | None, Option("--revision", help="Branch, tag or commit of a hub id.")
    ] = None,
    rows: Annotated[
        int | None,
        Option(
            "--rows",
            help="Rows of the embedding (programs pad the vocabulary differently); added ones are "
            "zeros.",
        ),
    ] = None,
    verify: Annotated[
        bool, Option("--verify", help="Read the result again and compare every tensor.")
    ] = False,
    average: Annotated[
        bool, Option("--average", help="Write the mean of several sources, in float32: a soup.")
    ] = False,
) -> None:
    """Write a model as a folder for another program, or for this one.

    The source's format is found by looking: transformers (safetensors or pytorch_model.bin), OLMo,
    OLMo-core, or this program's. The tokenizer travels along; hf gets a model card, README.md.

    ```
    olmo-jax convert runs/demo runs/demo/hf --to=hf
    olmo-jax convert allenai/OLMo-2-0425-1B models/olmo2 --to=orbax --verify
    olmo-jax convert --average runs/a runs/b runs/c runs/soup --to=orbax
    ```
    """
    from olmo_jax.convert.export import convert

    *sources, target = paths
    if len(sources) != 1 and not (average and sources):
        raise UserError(f"{len(paths)} paths given: give a source and a target (or --average)")
    with progress("writing and verifying" if verify else "writing") as advance:
        report = convert(
            sources,
            target,
            to,
            dtype=dtype,
            step=step,
            revision=revision,
            rows=rows,
            verify=verify,
            progress=advance,
        )
    if report:
        print(report)
    loads = {
        "hf": f"AutoModelForCausalLM.from_pretrained({target!r}) loads it",
        "orbax": f"olmo_jax.load({target!r}) and Train.init_from take it",
    }
    print("; ".join([f"{target}: written", *([loads[to]] if to in loads else [])]))


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
        from olmo_jax.storage import location

        path = location(run) / "data.json"
        kept = read_json(path) | {"baselines": read_json(Path(baselines))}
        write_atomically(path, (json.dumps(kept, indent=2) + "\n").encode())
    print(write_report(run))


@app.command()
def models(
    show: Annotated[
        list[str] | None, Argument(metavar="[show NAME]", help="One model's architecture.")
    ] = None,
) -> None:
    """List the released models that Model.preset knows: sizes, data, licence, and our recipe.

    ```
    olmo-jax models
    olmo-jax models show olmo2_1b
    ```
    """
    if show:
        _show_model(show)
        return
    from olmo_jax.model.presets import PRESETS
    from olmo_jax.numerals import count_text

    line = "{:<24}{:>12}{:>10}{:>10}{:>9}  {}".format
    print(line("preset", "parameters", "active", "context", "tokens", "recipe"))
    for name, released in PRESETS.items():
        model = released.config()
        counts = (model.parameter_count(active=active) for active in (False, True))
        context, tokens = f"{model.context_length:,}", count_text(released.tokens)
        print(line(name, *map(count_text, counts), context, tokens, released.recipe or "-"))
        print(f"    {released.about}\n    data: {released.data}; licence: {released.licence}")


def _show_model(words: Sequence[str]) -> None:
    """`olmo-jax models show NAME`: every choice of the architecture that is not left out."""
    from dataclasses import asdict

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from olmo_jax.model.presets import PRESETS, preset

    if words[0] != "show" or len(words) != 2:
        raise UserError(f"models {' '.join(words)}: give `models`, or `models show NAME`")
    name = words[1]
    model, released = preset(name), PRESETS[name]
    table = Table("field", "value", box=SIMPLE_HEAD, title=released.about, title_justify="left")
    rows = {
        "parameters": f"{model.parameter_count():,}",
        "active parameters": f"{model.parameter_count(active=True):,}",
        "tokens": f"{released.tokens:,}",
        "data": released.data,
        "licence": released.licence,
        "recipe": released.recipe or "none: too little was published",
        **{field: str(value) for field, value in asdict(model).items() if value is not None},
    }
    for field, value in rows.items():
        table.add_row(field, value)
    Console().print(table)


# --- samples in the loop --------------------------------------------------------------------------


class Samples:
    """The loop's evaluator that lets the model continue `Train.sample_prompts`."""

    def __init__(self, config: "RunConfig", tokenizer_path: str):
        from olmo_jax.data.tokenizer import load_tokenizer
        from olmo_jax.generate.text import encode_prompt

        self.prompts, self.max_tokens = config.train.sample_prompts, config.train.sample_tokens
        self.eos_id, context = config.data.eos_token_id, config.model.context_length
        self.tokenizer = load_tokenizer(tokenizer_path)
        for prompt in self.prompts:
            n = len(encode_prompt(self.tokenizer, prompt, self.eos_id))
            if not n or n + self.max_tokens > context:
                raise UserError(
                    f"Train.sample_prompts: {prompt!r} has {n} tokens, which must be at least 1 "
                    f"and, with Train.sample_tokens = {self.max_tokens}, at most "
                    f"Model.context_length = {context}"
                )

    def __call__(self, model, step: int) -> "Evaluation":
        from olmo_jax.generate import Request, Sampling, generate_batch
        from olmo_jax.generate.text import encode_prompt
        from olmo_jax.parallel.watch import beat
        from olmo_jax.train.evaluate import Evaluation

        eos_ids = () if self.eos_id is None else (self.eos_id,)
        requests = []
        for prompt in self.prompts:
            ids = tuple(encode_prompt(self.tokenizer, prompt, self.eos_id))
            sampling = Sampling(temperature=0.8, top_p=0.95)
            requests.append(Request(ids, self.max_tokens, sampling, eos_ids=eos_ids))
        texts = [
            self.tokenizer.decode(completion.token_ids, skip_special_tokens=False)
            for completion in generate_batch(model, requests, progress=lambda *_: beat())
        ]
        samples = list(zip(self.prompts, texts, strict=True))
        return Evaluation({}, samples)


def _samples(config: "RunConfig") -> list[Samples]:
    train = config.train
    if not train.sample_prompts:
        return []
    if train.tokenizer is None:
        raise UserError("Train.sample_prompts is given and Train.tokenizer is not: give both")
    return [Samples(config, train.tokenizer)]


class Tasks:
    """The loop's evaluator of `Train.evaluators`."""

    def __init__(self, config: "RunConfig", tokenizer_path: str):
        from olmo_jax.data.tokenizer import load_tokenizer
        from olmo_jax.eval.in_loop import Tasks
        from olmo_jax.parallel.mesh import build_mesh

        train = config.train
        self._run = Tasks(
            train.evaluators,
            load_tokenizer(tokenizer_path),
            config.data.eos_token_id,
            train.evaluators_limit,
            config.model.context_length,
            lambda: build_mesh(config.mesh),
        )

    def __call__(self, model, step: int) -> "Evaluation":
        from olmo_jax.train.evaluate import Evaluation

        return Evaluation(self._run(model, step))


def _tasks(config: "RunConfig") -> list[Tasks]:
    train = config.train
    if not train.evaluators:
        return []
    if train.tokenizer is None:
        raise UserError("Train.evaluators is given and Train.tokenizer is not: give both")
    return [Tasks(config, train.tokenizer)]


def _report(run_dir: str) -> None:
    """Writes a run's page; the run's own status stands whatever becomes of it."""
    from olmo_jax.report.report import write_report

    try:
        print(f"report: {write_report(run_dir)}")
    except Exception as error:
        _print_error(f"no report: {error}")


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)
    for line in message.splitlines():
        console.print(Text.assemble(("error: ", "bold red"), line))


if __name__ == "__main__":  # python -m olmo_jax.cli
    main()
