"""The model card says what is known of a run, nothing else, and stays Markdown whatever that is."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hf_models import OLMO2, perturbed
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_convert_hf import save

from olmo_jax.checkpoint import CheckpointConfig, Checkpointer
from olmo_jax.checkpoint.fork import fork
from olmo_jax.convert.card import markdown
from olmo_jax.convert.export import convert
from olmo_jax.data.config import DataConfig
from olmo_jax.model.transformer import parameters
from olmo_jax.parallel.mesh import MeshConfig
from olmo_jax.train.config import RunConfig, TrainConfig
from olmo_jax.train.optimizer import OptimizerConfig
from olmo_jax.train.schedules import ScheduleConfig

FRONT_MATTER = {"library_name": "transformers", "pipeline_tag": "text-generation"}
HOSTILE = "</td>| `x` | <script>1</script> ![i](http://e.example) \\| \n---\n# *b* _c_ &lt;"


def headings_and_cells(text: str) -> tuple[list[str], list[list[str]]]:
    """What a reader sees of a card without its front matter: headings, and the rows of tables."""
    before, front, body = text.split("---\n", 2)
    assert before == "" and yaml.safe_load(front) == FRONT_MATTER
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    assert not [t.type for t in tokens if t.type.startswith(("html", "hr"))]
    headings, rows = [], []
    for token, content in itertools.pairwise(tokens):
        if token.type == "heading_open":
            headings.append(shown(content))
        elif token.type == "tr_open":
            rows.append([])
        elif token.type in ("td_open", "th_open"):
            rows[-1].append(shown(content))
    return headings, rows


def shown(inline) -> str:
    assert all(child.type in ("text", "text_special") for child in inline.children), inline
    return "".join(child.content for child in inline.children)


def write_run(folder: Path) -> Path:
    """A run with checkpoints of steps 20 and 25, and the files that the loop writes."""
    model = perturbed(OLMO2)
    run = RunConfig(
        model=OLMO2,
        optimizer=OptimizerConfig(kind="muon", learning_rate=0.04),
        schedule=ScheduleConfig(kind="wsd", warmup=5, decay=10),
        data=DataConfig(paths=("/secret/place/*.npy",), sequence_length=64, batch_size=8),
        train=TrainConfig(steps=40, seed=7, init_from=("/secret/place/base",)),
        checkpoint=CheckpointConfig(),
        mesh=MeshConfig(),
    )
    (folder / "checkpoints").mkdir(parents=True)
    with Checkpointer(folder / "checkpoints", CheckpointConfig(every=5)) as checkpointer:
        for step in (20, 25):
            facts = {"n": 8 * step, "tokens": 512 * step, "fingerprint": "f00d"}
            metadata = facts | {"config": run.as_json()}
            checkpointer.save(step, {"params": parameters(model)}, metadata)
    source = {"source": HOSTILE, "files": 3, "bytes": 9, "tokens": 12345, "documents": None}
    data = {"sources": [source | {"instances": 192, "share": 0.25}], "fingerprint": "f00d"}
    (folder / "data.json").write_text(json.dumps(data))
    environment = {"platform": "gpu", "device_kind": "Fast | GPU", "devices": 8, "jax": "0.10"}
    (folder / "environment.json").write_text(json.dumps(environment))
    rows: list[dict] = [{"step": step, "loss": 3.0} for step in range(1, 31)]
    for step, bits in (10, 2.5), (20, 2.25), (30, 2.0):
        figures = {"heldout/loss": 3 * bits, "heldout/bits_per_byte": bits}
        rows.append({"step": step, **figures, "heldout/bytes": 212045, "heldout/broken": None})
    lines = [json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 12, "heldout/lo']))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("card") / "my-run")


def card(source: Path, target: Path, **options) -> str:
    convert(source, target, **options)
    return (target / "README.md").read_text()


@pytest.mark.parametrize("step", [20, 25, None])
def test_a_run_tells_its_facts_up_to_the_checkpoint(run, tmp_path, step):
    text = card(run, tmp_path / "hf", step=step)
    headings, rows = headings_and_cells(text)
    assert headings == ["my-run", "Use", "Architecture", "Training", "Data", "Evaluation"]
    facts = {row[0]: row[1] for row in rows if len(row) == 2}
    done = step or 25
    assert facts["steps"] == f"{done} of 40" and facts["tokens"] == f"{512 * done:,}"
    assert facts["seeds"] == "weights = 7; data = 0"
    assert facts["optimizer"].startswith("kind = muon; learning_rate = 0.04; betas = (0.9, 0.95)")
    assert "skip" not in facts["optimizer"] and "muon_momentum" in facts["optimizer"]
    assert "kind = wsd" in facts["schedule"] and "warmup = 5" in facts["schedule"]
    assert "exponent" not in facts["schedule"]
    assert facts["started from"] == "base" and facts["ran (last) on"] == "8 x Fast | GPU"
    assert facts["data's fingerprint"] == "f00d" and facts["software"] == "jax 0.10"
    assert "after step 20:" in text and facts["bits per byte"] == "2.25"
    assert facts["loss, nats a token"] == "6.75" and facts["size of the text"] == "212 kB"
    assert "broken" not in text and "secret" not in text
    assert facts["d_model"] == "64" and "n_experts" not in facts and "rope_factor" not in facts
    assert f"of {OLMO2.parameter_count():,} parameters, for transformers' `Olmo2For" in text
    assert ["source", "files", "tokens", "instances", "share"] in rows
    assert [" ".join(HOSTILE.split()), "3", "12,345", "192", "25.0%"] in rows


def test_what_is_not_known_is_left_out(run, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run / "checkpoints", bare / "checkpoints")
    headings, rows = headings_and_cells(card(bare, tmp_path / "hf"))
    assert headings == ["bare", "Use", "Architecture", "Training"]
    assert "ran (last) on" not in {row[0] for row in rows}
    # Damaged files, and those of other data, are as good as none.
    (bare / "data.json").write_text('{"sources": [{"source": "a", "tokens": 5}]}')
    (bare / "environment.json").write_text("[1")
    (bare / "metrics.jsonl").write_text('{"heldout/loss": 1}\n["heldout/"]\n{"step": 26, "heldout/')
    assert headings_and_cells(card(bare, tmp_path / "hf2")) == (headings, rows)
    # A checkpoint on its own has no run folder, and so no name.
    shutil.copytree(run / "checkpoints" / "step20", tmp_path / "lone" / "step20")
    headings, _ = headings_and_cells(card(tmp_path / "lone" / "step20", tmp_path / "hf3"))
    assert re.fullmatch(r"Olmo2ForCausalLM, \S+ parameters", headings[0])


def test_a_fork_tells_of_what_it_was_forked_from(run, tmp_path):
    fork(run, tmp_path / "forked", 20)
    for name in ("data.json", "environment.json", "metrics.jsonl"):  # of the run it becomes
        shutil.copy(run / name, tmp_path / "forked")
    headings, rows = headings_and_cells(card(tmp_path / "forked", tmp_path / "hf"))
    assert headings == ["forked", "Use", "Architecture", "Training"]
    assert ["forked from", "my-run, step 20"] in rows
    assert "ran (last) on" not in {row[0] for row in rows}


def test_a_model_without_a_run_has_its_architecture_and_its_loading_lines(tmp_path):
    ours = save(perturbed(OLMO2), tmp_path / "ours")
    cards = [card(ours, tmp_path / "hf")]
    (tmp_path / "hf" / "README.md").write_text("# Somebody else's\n")
    cards.append(card(tmp_path / "hf", tmp_path / "again"))
    convert(tmp_path / "hf", tmp_path / "orbax", "orbax")
    cards.append(card(tmp_path / "orbax", tmp_path / "back"))
    assert cards[1] == cards[2]  # whose vocabulary is not known without a tokenizer
    for text in cards:
        assert headings_and_cells(text)[0][1:] == ["Use", "Architecture"]
    # The mean of two runs is neither's.
    mean = [write_run(tmp_path / name) for name in ("a", "b")]
    soup = card(mean, tmp_path / "soup")
    assert soup.split("##")[1:] == cards[0].split("##")[1:]
    assert "mean of those of 2 models: a, b." in soup


def test_the_lines_of_the_card_load_the_model(tmp_path):
    text = card(save(perturbed(OLMO2), tmp_path / "ours"), tmp_path / "hf")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "hf" / "card.py").write_text("\n".join(blocks))
    subprocess.run([sys.executable, "card.py"], cwd=tmp_path / "hf", check=True, timeout=300)


@pytest.mark.parametrize(
    "name", ["a|b %41 # `c` <script> [x](y) *z*", "\n---\nlicense: mit\n---\n"]
)
def test_a_hostile_name_is_only_a_name(run, tmp_path, name):
    shutil.copytree(run, tmp_path / name)
    headings, rows = headings_and_cells(card(tmp_path / name, tmp_path / "hf", step=20))
    assert headings[0] == " ".join(name.split())
    assert len(headings) == 6 and ["steps", "20 of 40"] in rows


@given(st.text())
def test_any_text_is_shown_as_it_is(text):
    wanted = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    body = f"# .{markdown(text)}.\n\n| a | b |\n|---|---|\n| {markdown(text)} | . |\n"
    headings, rows = headings_and_cells(f"---\n{yaml.safe_dump(FRONT_MATTER)}---\n{body}")
    assert headings == [f".{wanted}."]
    assert rows[1] == [wanted, "."]
