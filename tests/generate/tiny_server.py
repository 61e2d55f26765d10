"""A tiny model with a tokenizer, in memory or as a run folder, and a server of it."""

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from olmo_jax.checkpoint import CheckpointConfig, Checkpointer
from olmo_jax.data.tokenizer import train_tokenizer
from olmo_jax.generate.chat import ChatTemplate, TextFiles
from olmo_jax.generate.serve import WebServer, bound
from olmo_jax.generate.server import Server
from olmo_jax.model.config import ModelConfig
from olmo_jax.model.transformer import init, parameters

CONFIG = ModelConfig(  # a context of one bucket: few programs are compiled
    vocab_size=300,
    d_model=32,
    n_layers=1,
    n_heads=2,
    mlp_width=48,
    context_length=64,
    init_std=0.3,
)


def tiny_tokenizer(folder: Path) -> Tokenizer:
    text = "né ñandú 漢字 🙂 To-morrow, and to-morrow, and to-morrow, creeps in this petty pace. "
    (folder / "text.jsonl").write_text(f'{{"id": "a", "text": "{text * 20}"}}\n')
    return train_tokenizer([str(folder / "text.jsonl")], folder / "tokenizer.json", 300)


TEMPLATE = """{% for m in messages %}[{{ m.role }}]{{ m.content }}
{% endfor %}{% if messages[-1].role != "user" %}{{ raise_exception("whose turn?") }}{% endif %}
{% if add_generation_prompt %}[assistant]{% endif %}"""


def tiny_text(folder: Path, eos_ids=(0,), chat: bool = True) -> TextFiles:
    return TextFiles(tiny_tokenizer(folder), eos_ids, ChatTemplate(TEMPLATE, {}) if chat else None)


def tiny_run(folder: Path, seed: int = 0, chat: bool = False) -> Path:
    """A run folder; `chat`: with the template."""
    tokenizer = tiny_tokenizer(folder)
    config = {"Model": dataclasses.asdict(CONFIG), "Data": {"eos_token_id": 0}}
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    if chat:
        files["chat_template.jinja"] = TEMPLATE.encode()
    with Checkpointer(run / "checkpoints", CheckpointConfig(), files) as checkpointer:
        checkpointer.save(1, {"params": parameters(init(CONFIG, seed))}, {"config": config})
    return run


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """Its address."""
    listener = bound("127.0.0.1", 0)
    web = WebServer(server, "127.0.0.1")
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        while not web.started:
            thread.join(0.01)
            assert thread.is_alive()
        yield address
    finally:
        web.leave()
        thread.join()
