"""`olmo-jax generate` and `olmo-jax chat`: text from a model."""

import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from olmo_jax.errors import UserError

if TYPE_CHECKING:
    from olmo_jax.generate.sampling import Sampling

Model = Annotated[
    str,
    Argument(
        help="A run folder, one of its checkpoints, or any folder, hub id or address that convert "
        "reads."
    ),
]
MaxTokens = Annotated[int, Option("--max_tokens", help="At most so many tokens.")]
Temperature = Annotated[
    float, Option("--temperature", help="0 takes the likeliest token each time.")
]
TopK = Annotated[int | None, Option("--top_k", help="Only the K likeliest tokens.")]
TopP = Annotated[
    float, Option("--top_p", help="Only the likeliest tokens that reach this probability.")
]
MinP = Annotated[
    float, Option("--min_p", help="Only tokens with this share of the likeliest's probability.")
]
RepetitionPenalty = Annotated[
    float, Option("--repetition_penalty", help="Above 1: tokens that were there are less likely.")
]
Stop = Annotated[
    list[str] | None, Option("--stop", help="A text to end before; give it again for more.")
]
Seed = Annotated[int, Option("--seed", help="The same seed gives the same text.")]
Int8 = Annotated[
    bool,
    Option(
        "--int8",
        help="Keep the weights of the layers and of the head in int8: a quarter of float32's "
        "memory once they are read (experts and embedding stay). Texts change a little. On CPU one "
        "text takes less processor time a token, but only one core; a long prompt up to 1.5 times "
        "as long.",
    ),
]


def generate(
    model: Model,
    prompt: Annotated[
        list[str] | None,
        Option("--prompt", help="The text to go on from; give it again for more."),
    ] = None,
    prompts: Annotated[
        Path | None,
        Option("--prompts", metavar="FILE", help='Prompts as JSONL: {"prompt": "…"} a line.'),
    ] = None,
    out: Annotated[
        Path | None, Option("--out", metavar="FILE", help="Write the texts there, as JSONL.")
    ] = None,
    max_tokens: MaxTokens = 100,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    int8: Int8 = False,
) -> None:
    """Let a model continue a text, on stdout as it comes; tokens/s at the end, on stderr.

    Several prompts run together and come out as JSONL, a line for each in their order: prompt,
    text, tokens, and finish ("stop" or "length"). With --out the same command goes on where it was
    killed.

    ```
    olmo-jax generate runs/demo --prompt="**MACBETH**" --max_tokens=200
    olmo-jax generate runs/demo --prompts=prompts.jsonl --out=texts.jsonl --stop="**"
    ```
    """
    from olmo_jax.generate.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    given = [*(prompt or []), *(_read_prompts(prompts) if prompts else [])]
    if not given:  # a document from its beginning
        given = [""]
    if len(given) > 1 or prompts or out:
        _write_texts(model, given, out, max_tokens, sampling, tuple(stop or ()), seed, int8)
    else:
        _stream(model, given[0], max_tokens, sampling, tuple(stop or ()), seed, int8)


def _stream(
    model: str,
    prompt: str,
    max_tokens: int,
    sampling: "Sampling",
    stop: tuple[str, ...],
    seed: int,
    int8: bool,
) -> None:
    """One prompt's text as it comes."""
    from olmo_jax.convert.load import load
    from olmo_jax.generate.chat import load_text_files
    from olmo_jax.generate.engine import Engine
    from olmo_jax.generate.text import generate_text

    ids, files = list[int](), load_text_files(model)
    pieces = generate_text(
        Engine(load(model), slots=1, int8=int8),
        files.tokenizer,
        prompt,
        max_tokens,
        sampling,
        eos_ids=files.eos_ids,
        stop=stop,
        seed=seed,
        ids=ids,
    )
    print(prompt, end="", flush=True)
    first, start = 0, 0.0
    for piece in pieces:
        if not first:  # it has waited for compilation
            first, start = len(ids), time.perf_counter()
        print(piece, end="", flush=True)
    speed = (len(ids) - first) / (time.perf_counter() - start)
    print()
    print(f"{len(ids)} tokens, {speed:,.0f} tokens/s after the first few", file=sys.stderr)


def _read_prompts(path: Path) -> list[str]:
    from olmo_jax.data.documents import parse_line, read_lines

    out = []
    for line in read_lines(str(path)):
        prompt = parse_line(line, str(path)).get("prompt")
        if not isinstance(prompt, str):
            raise UserError(
                f'{path}, line {line.number}: give {{"prompt": "…"}}, a line for each prompt'
            )
        out.append(prompt)
    if not out:
        raise UserError(f'{path}: has no prompts: give {{"prompt": "…"}}, a line for each')
    return out


def _write_texts(
    model: str,
    prompts: list[str],
    out: Path | None,
    max_tokens: int,
    sampling: "Sampling",
    stop: tuple[str, ...],
    seed: int,
    int8: bool,
) -> None:
    """A line of JSON for each prompt, in their order, on stdout or in a file; prompt i has the seed
    seed + i. An unfinished file lies beside `out`, under a name of all that was asked for and of
    the model's weights, which training may have replaced meanwhile."""
    from rich.console import Console
    from rich.progress import Progress

    from olmo_jax.convert.load import fingerprint, load
    from olmo_jax.files import make_folder_of, write_error
    from olmo_jax.generate.chat import load_text_files
    from olmo_jax.generate.engine import Engine, Request
    from olmo_jax.generate.text import encode_prompt, generate_texts

    if out:
        make_folder_of(out)
    files = load_text_files(model)
    eos = files.eos_ids[0] if files.eos_ids else None
    requests = [
        Request(
            tuple(encode_prompt(files.tokenizer, p, eos)),
            max_tokens,
            sampling,
            seed + i,
            files.eos_ids,
        )
        for i, p in enumerate(prompts)
    ]
    weights = load(model)
    part, done = None, 0
    if out:
        asked = repr([fingerprint(weights), prompts, requests, stop, int8])
        part = out.with_name(f".{out.name}.{zlib.crc32(asked.encode()):08x}.part")
        done = _whole_lines(part)
    requests = requests[done:]
    waiting: dict[int, dict] = {}
    first, tokens, start, console = done, 0, time.perf_counter(), Console(stderr=True)
    try:
        file = open(part, "a", encoding="utf-8") if part else sys.stdout  # noqa: SIM115
        with Progress(console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("generating", total=len(prompts), completed=done)
            slots = max(1, min(16, len(requests)))
            engine = Engine(weights, slots=slots, int8=int8)
            del weights  # with int8 the engine has its own
            for i, text, n, finish in generate_texts(engine, files.tokenizer, requests, stop):
                tokens += n
                waiting[first + i] = {"text": text, "tokens": n, "finish": finish}
                while done in waiting:
                    line = {"prompt": prompts[done], **waiting.pop(done)}
                    print(json.dumps(line, ensure_ascii=False), file=file, flush=True)
                    bar.advance(task)
                    done += 1
        if part and out:
            file.close()
            os.replace(part, out)
    except OSError as error:
        raise write_error(out or Path("stdout"), error) from None
    speed = tokens / (time.perf_counter() - start)
    print(f"{tokens:,} tokens, {speed:,.0f} tokens/s, compilation included", file=sys.stderr)


def _whole_lines(part: Path) -> int:
    """How many lines a killed command has left; what it was in the middle of is cut off."""
    if not part.exists():
        return 0
    content = part.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        part.write_bytes(whole)
    return whole.count(b"\n")


def chat(
    model: Model,
    system: Annotated[
        str | None, Option("--system", help="What the model is told before the conversation.")
    ] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.6,
    top_k: TopK = None,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    int8: Int8 = False,
) -> None:
    """Talk to a model that was tuned for it, through its own chat template.

    A line is a message; /new begins a new conversation, and Ctrl-D ends it.

    ```
    olmo-jax chat allenai/OLMo-2-0425-1B-Instruct
    ```
    """
    from olmo_jax.cli_shared import print_error
    from olmo_jax.convert.load import load
    from olmo_jax.generate.chat import load_text_files
    from olmo_jax.generate.engine import Engine
    from olmo_jax.generate.sampling import Sampling
    from olmo_jax.generate.text import generate_text

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    files = load_text_files(model)
    begin = [{"role": "system", "content": system}] if system else []
    files.chat_ids([*begin, {"role": "user", "content": "Hello"}])  # before the weights are read
    engine, messages = Engine(load(model), slots=1, int8=int8), list(begin)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            print()
            return
        if said == "/new":
            messages = list(begin)
        if not said or said == "/new":
            continue
        messages.append({"role": "user", "content": said})
        ids = files.chat_ids(messages)
        room = engine.max_length - len(ids)
        if room < 1:
            print_error(
                f"the conversation has {len(ids)} tokens, and the model's context "
                f"{engine.max_length}: /new begins a new one"
            )
            messages.pop()
            continue
        pieces = generate_text(
            engine,
            files.tokenizer,
            ids,
            min(max_tokens, room),
            sampling,
            eos_ids=files.eos_ids,
            stop=tuple(stop or ()),
            seed=seed + len(messages),
        )
        answer = ""
        for piece in pieces:
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})
