"""`olmo-jax generate`: what is read as prompts, and what becomes of the file of texts."""

import dataclasses
import json
import shutil
from unittest.mock import Mock

import jax
import pytest
from tiny_server import CONFIG, tiny_run

from olmo_jax import cli
from olmo_jax.convert.load import fingerprint
from olmo_jax.model.transformer import bind, init, parameters


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run"))


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_without_a_prompt_a_document_is_begun(run, tmp_path):
    out = tmp_path / "new" / "x.jsonl"
    assert cli.run(["generate", str(run), f"--out={out}", "--max_tokens=2"]) == 0
    assert [row["prompt"] for row in rows(out)] == [""]


def test_prompts_may_hold_any_of_unicodes_line_ends_and_blank_lines_are_none(run, tmp_path):
    texts = ["a\u2028b", "c\u0085d\u2029"]
    lines = "\n\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "p.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    out = tmp_path / "x.jsonl"
    options = [f"--prompts={tmp_path / 'p.jsonl'}", f"--out={out}", "--max_tokens=2"]
    assert cli.run(["generate", str(run), *options]) == 0
    assert [row["prompt"] for row in rows(out)] == texts


@pytest.mark.parametrize("content", ["", "\n", '{"prompt": 1}\n', "[]\n"])
def test_a_file_without_prompts_is_refused(content, run, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(content)
    out = tmp_path / "x.jsonl"
    out.write_text("kept")
    options = [f"--prompts={tmp_path / 'p.jsonl'}", f"--out={out}"]
    assert cli.run(["generate", str(run), *options]) == 2
    assert "p.jsonl" in capsys.readouterr().err and out.read_text() == "kept"


def test_another_checkpoint_at_the_same_place_begins_anew(tmp_path, monkeypatch):
    run, out = tiny_run(tmp_path), tmp_path / "x.jsonl"
    command = ["generate", str(run), "--prompt=a", "--prompt=b", f"--out={out}", "--max_tokens=2"]
    monkeypatch.setattr("os.replace", Mock(side_effect=KeyboardInterrupt))
    assert cli.run(command) == 130
    monkeypatch.undo()
    (part,) = tmp_path.glob(".x.jsonl.*.part")
    part.write_text('{"text": "was here"}\n')
    kept = part.read_bytes()
    shutil.rmtree(run)
    tiny_run(tmp_path, seed=1)
    assert cli.run(command) == 0
    assert [row["prompt"] for row in rows(out)] == ["a", "b"]
    shutil.rmtree(run)
    tiny_run(tmp_path)
    assert part.read_bytes() == kept  # the first one's, which goes on from there
    assert cli.run(command) == 0
    assert [row["text"] == "was here" for row in rows(out)] == [True, False]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_fingerprint_is_of_every_layer(layer):
    model = init(dataclasses.replace(CONFIG, n_layers=3))
    params = parameters(model)
    change = lambda a: a.at[layer].add(1) if a.shape[0] == 3 else a  # noqa: E731
    other = bind(model, jax.tree.map(change, params))
    assert fingerprint(other) != fingerprint(model) == fingerprint(bind(model, params))


def test_a_conversation_that_fills_the_context_can_be_begun_anew(tmp_path, monkeypatch, capsys):
    run = tiny_run(tmp_path, chat=True)
    said = iter(["a", "x" * 100, "b" * 40, "/new", "b"])
    monkeypatch.setattr("builtins.input", lambda _: next(said, None) or end())

    def end():
        raise EOFError

    assert cli.run(["chat", str(run), "--max_tokens=1"]) == 0
    assert capsys.readouterr().err.count("/new begins a new one") >= 1
    assert next(said, None) is None
