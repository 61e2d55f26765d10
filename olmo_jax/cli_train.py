"""`olmo-jax train`, `fork`, `report`: a run, with what the loop asks of rooms it does not know."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Context, Option

from olmo_jax.cli_shared import AllowGinImports, GinFiles, bindings, print_error, read_json
from olmo_jax.errors import UserError

if TYPE_CHECKING:
    from olmo_jax.train.config import RunConfig
    from olmo_jax.train.evaluate import Evaluation, Evaluator


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
    raise typer.Exit(train(config, to_gin(config), _evaluators(config), at_end, steps))


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


def report(
    run: Annotated[str, Argument(help="A run folder.")],
    baselines: Annotated[
        str | None,
        Option("--baselines", help='JSON of others\' bits per byte, {"name": 2.3}; kept in RUN.'),
    ] = None,
) -> None:
    """Write a run's page: plots, samples, configuration, environment, data; and where its token
    files are at hand, batches.html to browse what it read.

    ```
    olmo-jax report runs/demo
    ```
    """
    from olmo_jax.report.batches import NAME, write_batches
    from olmo_jax.report.report import write_report

    if baselines:
        from olmo_jax.data.token_files import write_atomically
        from olmo_jax.storage import location

        path = location(run) / "data.json"
        kept = read_json(path) | {"baselines": read_json(Path(baselines))}
        write_atomically(path, (json.dumps(kept, indent=2) + "\n").encode())
    batches, why = None, ""
    try:
        batches = write_batches(run)
    except UserError as error:
        why = str(error)
    print(write_report(run))
    print(batches or f"no {NAME}: {why}")


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


def _evaluators(config: "RunConfig") -> "list[Evaluator]":
    """What the configuration asks for beside held-out text."""
    train = config.train
    kinds: dict[str, type[Samples] | type[Tasks]] = {"sample_prompts": Samples, "evaluators": Tasks}
    out: list[Evaluator] = []
    for name, kind in kinds.items():
        if getattr(train, name):
            if train.tokenizer is None:
                raise UserError(f"Train.{name} is given and Train.tokenizer is not: give both")
            out.append(kind(config, train.tokenizer))
    return out


def _report(run_dir: str) -> None:
    """Writes a run's page; the run's own status stands whatever becomes of it."""
    from olmo_jax.report.report import write_report

    try:
        print(f"report: {write_report(run_dir)}")
    except Exception as error:
        print_error(f"no report: {error}")
