"""lm-eval on our model and lm-eval's own hf on the exported one give the same results."""

import json
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from exported import FAMILIES, export, model_of
from tokenizers import Tokenizer

from olmo_jax import cli
from olmo_jax.eval import wheel
from olmo_jax.eval.compare import read_result
from olmo_jax.generate import generate

ARROW = "hf_datasets/ai2_arc/ARC-Easy/validation/data-00000-of-00001.arrow"
LIMIT = 40
COMMON = """
task: {name}
dataset_path: arrow
dataset_kwargs: {{data_files: {{validation: {arrow}}}}}
test_split: validation
output_type: {kind}
"""
TASKS = {
    "arc_offline": (
        "multiple_choice",
        """
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    ),
    "arc_writes": (
        "generate_until",
        """
doc_to_text: "{{question}} Answer:"
doc_to_target: "{{choices.text[0]}}"
generation_kwargs: {until: ["er", "\\n"], max_gen_toks: 24, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    ),
    "arc_rolls": (
        "loglikelihood_rolling",
        """
doc_to_text: ""
doc_to_target: "{{question}} {{choices.text|join(' ')}} {{question}}"
metric_list:
  - {metric: bits_per_byte}
  - {metric: word_perplexity}
""",
    ),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files over ARC-Easy, which ask the network for nothing."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "arc.arrow").write_bytes(wheel.read(ARROW))
    for name, (kind, rest) in TASKS.items():
        head = COMMON.format(name=name, arrow=folder / "arc.arrow", kind=kind)
        (folder / f"{name}.yaml").write_text(head + rest)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(model_of(FAMILIES["olmo2"], seed=1), tmp_path_factory.mktemp("exported") / "m")


@pytest.mark.slow
def test_the_command_writes_into_a_new_folder(folder, tasks, tmp_path, capsys):
    command = ["eval", str(folder), "--harness=arc_offline", f"--include_path={tasks}"]
    command += ["--limit=3"]
    assert cli.run([*command, f"--out={tmp_path / 'r.txt'}"]) == 2
    assert "ends in .json" in capsys.readouterr().err
    out = tmp_path / "new" / "r.json"
    assert cli.run([*command, f"--out={out}"]) == 0
    shown = capsys.readouterr().out
    assert "arc_offline" in shown and f"written: {out}" in shown
    assert len(read_result(out).tasks["arc_offline"].names) == 3


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ours_and_hf_give_the_same(family, tasks, tmp_path):
    folder = export(model_of(FAMILIES[family], seed=1), tmp_path / "model")
    common = ["--tasks", ",".join(TASKS), "--include_path", str(tasks), "--limit", str(LIMIT)]
    common += ["--log_samples", "--output_path"]
    ours = ["olmo_jax.eval.harness", "run", "--model", "olmo_jax"]
    theirs = ["lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "1"]
    found = []
    for command, path in ((ours, folder), (theirs, folder / "hf")):
        out = tmp_path / command[0]
        arguments = f"pretrained={path}" + ("" if command is ours else ",dtype=float32")
        command = [sys.executable, "-m", *command, "--model_args", arguments, *common, str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(read(out))
    (results, samples), (hf_results, hf_samples) = found
    for task, metrics in hf_results.items():
        for name, value in metrics.items():
            if isinstance(value, float):
                # Counts of questions are equal, or not; likelihoods are floats.
                exact = name.startswith(("acc", "exact_match"))
                same = value == results[task][name] if exact else None
                assert same or results[task][name] == pytest.approx(value, rel=1e-4), (task, name)
    assert 0 < hf_results["arc_offline"]["acc,none"] < 1
    for task in TASKS:
        assert len(samples[task]) == LIMIT
        for a, b in zip(samples[task], hf_samples[task], strict=True):
            if task == "arc_writes":
                assert a["filtered_resps"] == b["filtered_resps"]
            else:
                ours, hf = ([float(first(r)) for r in x["filtered_resps"]] for x in (a, b))
                assert np.allclose(ours, hf, atol=1e-4, rtol=1e-6), (task, ours, hf)
    texts = [s["filtered_resps"][0] for s in samples["arc_writes"]]
    assert len(set(texts)) > 5 and not any("er" in text for text in texts)


def first(response):
    """The log-likelihood of (it, whether it is greedy), or of a rolling request, itself."""
    return response[0] if isinstance(response, list) else response


def read(folder) -> tuple[dict, dict]:
    """The results of an lm-eval run, and each task's samples in order."""
    (path,) = folder.rglob("results_*.json")
    samples = {}
    for name in TASKS:
        (file,) = folder.rglob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        samples[name] = sorted(rows, key=lambda row: row["doc_id"])
    return json.loads(path.read_text())["results"], samples


@pytest.mark.slow
def test_a_revision_is_of_all_files(folder, monkeypatch):
    from olmo_jax.convert import load, source
    from olmo_jax.eval.harness import OlmoJax
    from olmo_jax.generate import chat

    asked = []

    @contextmanager
    def of_the_hub(path, step=None, revision=None):
        """The hub's: another revision has another tokenizer_config.json."""
        asked.append(revision)
        with source.open_source(folder) as found:
            tokens = {"bos_token": {"content": "<|bos|>"}}
            found.files = dict(found.files) | {"tokenizer_config.json": json.dumps(tokens).encode()}
            found.files["tokenizer.json"] = with_bos
            yield found

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|bos|>"])
    with_bos = tokenizer.to_str().encode()
    monkeypatch.setattr(load, "open_source", of_the_hub)
    monkeypatch.setattr(chat, "open_source", of_the_hub)
    model = OlmoJax("someone/model", revision="step1000")
    assert asked == ["step1000"] * 3
    assert model.prefix_token_id == tokenizer.token_to_id("<|bos|>") != model.eot_token_id


@pytest.mark.slow
def test_a_special_token_ends_a_text(folder):
    from olmo_jax.eval.harness import OlmoJax

    model = OlmoJax(folder)
    tokenizer = model.files.tokenizer
    ids = list(generate(model.model, tokenizer.encode("To-morrow").ids, 20))
    stop = ids[5]
    tokenizer.add_special_tokens([tokenizer.id_to_token(stop)])
    options = {"until": [tokenizer.id_to_token(stop)], "max_gen_toks": 20, "do_sample": False}
    (text,) = model.generate_until([SimpleNamespace(args=("To-morrow", options))], True)
    assert text == tokenizer.decode(ids[: ids.index(stop)])


@pytest.mark.slow
def test_its_command_line_tells_mistakes_in_one_line(tasks, tmp_path):
    command = "-m olmo_jax.eval.harness run --model olmo_jax --tasks arc_offline --include_path"
    model = f"--model_args=pretrained={tmp_path}"
    command = [sys.executable, *command.split(), str(tasks), model]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and f"error: {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_neither_torch_nor_transformers_is_imported():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "import olmo_jax.eval.harness\n"
        "from lm_eval.api.registry import get_model\n"
        "assert get_model('olmo_jax').__name__ == 'OlmoJax' and 'hf' in "
        "__import__('lm_eval.api.registry', fromlist=['x']).model_registry"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
