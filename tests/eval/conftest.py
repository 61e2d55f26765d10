"""A tokenizer trained on the tasks' own questions, and tiny models of transformers with it."""

import json

import pytest

from olmo_jax.data.tokenizer import train_tokenizer
from olmo_jax.eval.tasks import load_task


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    questions = load_task("arc_easy", 200).questions + load_task("hellaswag", 100).questions
    texts = [q.contexts[0] + "".join(q.continuations) for q in questions]
    lines = [json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)]
    (folder / "text.jsonl").write_text("".join(lines))
    train_tokenizer([str(folder / "text.jsonl")], folder / "tokenizer.json", 600)
    return folder / "tokenizer.json"


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory, tokenizer_file):
    """hf_model(kind): (its folder, the model), random weights, 256 tokens of context."""
    import torch
    import transformers

    shape = dict(
        vocab_size=640,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=0,
    )
    kinds = {
        "olmo2": lambda: transformers.Olmo2Config(**shape),
        "pythia": lambda: transformers.GPTNeoXConfig(**shape, rotary_pct=0.25),
    }
    made = {}

    def make(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(kinds[kind]()).eval()
            model.save_pretrained(folder)
            (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
            made[kind] = folder, model
        return made[kind]

    return make
