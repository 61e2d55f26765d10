"""`olmo-jax data …`: tokenizers, token files, and a look at training instances."""

import os
from typing import Annotated

import typer
from typer import Argument, Context, Option

from olmo_jax.cli_curate import Kind, Retries, Workers, add_commands, make_executor
from olmo_jax.cli_shared import GIN, AllowGinImports, GinFiles, bindings, progress, run_config
from olmo_jax.cli_trace import data_trace
from olmo_jax.errors import UserError

app = typer.Typer(
    help="From documents to token files (tag, dedupe, mix, tokenize); look at instances.",
    no_args_is_help=True,
)

add_commands(app)
app.command("trace", context_settings=GIN)(data_trace)

Documents = Annotated[list[str], Argument(help="Documents as JSONL, also .gz or .zst.")]


@app.command("tokenizer")
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

    with progress("reading") as advance:
        tokenizer = train_tokenizer(files, out, vocab_size, advance)
    print(f"{out}: {tokenizer.get_vocab_size():,} tokens")


@app.command("tokenize")
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
    seed: Annotated[
        int | None, Option("--seed", help="Shuffle the documents; the inputs' order without.")
    ] = None,
    workers: Workers = None,
    executor: Kind = "local",
    retries: Retries = 1,
) -> None:
    """Turn documents into token files (.npy, with their documents in .csv.gz).

    The files have equal sizes as far as whole documents allow, and the same bytes for any number of
    workers. After a failure the same command goes on.

    ```
    olmo-jax data tokenize train.jsonl --out=data/train --tokenizer=tokenizer.json
    ```
    """
    from olmo_jax.curate.executor import job_runner
    from olmo_jax.data.tokenize import tokenize_documents

    done = tokenize_documents(
        files,
        out,
        tokenizer,
        eos_token=eos_token,
        strip=not keep_whitespace,
        max_tokens_per_file=max_tokens_per_file,
        seed=seed,
        run=job_runner(make_executor(executor, workers, retries), "tokenizing"),
    )
    print(
        f"{out}: {done.tokens:,} tokens of {done.documents:,} documents in {len(done.files)} files"
        f" of {done.files[0].dtype} ({done.skipped:,} empty documents skipped); "
        f"Data.eos_token_id = {done.eos_token_id}"
    )


@app.command("inspect", context_settings=GIN)
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
        bindings(context, options, allowed=False)
        config, own = run_config(run[0]), os.path.join(run[0], "tokenizer.json")
    else:
        from olmo_jax.config import load_config

        config = load_config(gin_file or [], bindings(context, options), allow_gin_imports)
        own = config.train.tokenizer or ""
    if not tokenizer and not own:
        raise UserError("Train.tokenizer is not given: give it, or --tokenizer=tokenizer.json")
    dataset = open_dataset(config.data, config.model.vocab_size)
    ahead = config.train.data_from_step
    print(describe_instance(dataset, int(n), tokenizer or own, ahead))
