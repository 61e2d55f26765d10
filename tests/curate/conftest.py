"""Documents for the tests: four files of made-up text with repeats, and a function that writes."""

import json
import random

import pytest


@pytest.fixture
def write_documents(tmp_path):
    """write_documents(name, texts): tmp_path/documents/name with a document a text."""

    def write(name, texts, **fields):
        (tmp_path / "documents").mkdir(exist_ok=True)
        path = tmp_path / "documents" / name
        rows = [{"id": f"{name}-{i}", "text": text, **fields} for i, text in enumerate(texts)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def corpus(tmp_path, write_documents):
    """Four files whose paragraphs come from a common stock, so that many are repeated."""
    random.seed(0)
    words = [f"word{i}" for i in range(300)]
    stock = [" ".join(random.choices(words, k=random.randint(3, 30))) for _ in range(120)]
    for file in range(4):
        texts = ["\n".join(random.choices(stock, k=random.randint(1, 9))) for _ in range(30)]
        write_documents(f"part-{file}.jsonl", texts, source="made")
    return tmp_path
