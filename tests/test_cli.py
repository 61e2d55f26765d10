"""The command line: help is quick and light, mistakes are one line, commands do what they say."""

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

import olmo_jax.cli as cli
from olmo_jax.config import load_config
from olmo_jax.train.config import RunConfig

ROOT = Path(__file__).parents[1]
COMMANDS = [
    ["train"],
    ["fork"],
    ["convert"],
    ["generate"],
    ["chat"],
    ["serve"],
    ["report"],
    ["models"],
    ["plan"],
    ["eval"],
    ["inspect"],
    ["data"],
    ["data", "tokenizer"],
    ["data", "tokenize"],
    ["data", "inspect"],
    ["study"],
    ["study", "memorization"],
    ["data", "trace"],
]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def in_a_new_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def error_of(arguments: list[str], capsys) -> str:
    """The one line on stderr of a command that is refused."""
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


# --- help ---------------------------------------------------------------------------------------


def test_the_package_imports_neither_jax_nor_its_rooms():
    code = """
import sys, olmo_jax
print([m for m in sys.modules if m.startswith("olmo_jax.") or m.partition(".")[0] == "jax"])
"""
    assert in_a_new_process(code).strip() == "[]"


def test_every_help_is_quick_and_imports_no_room():
    code = f"""
import contextlib, io, sys, time
from olmo_jax.cli import run
for command in {[[], *COMMANDS]}:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert run([*command, "--help"]) == 0
    assert "Usage: " + " ".join(["olmo-jax", *command]) in text.getvalue(), text.getvalue()
    assert command in ([], ["data"], ["study"]) or "olmo-jax " + " ".join(command) + " " in (
        text.getvalue().partition("Usage")[2].partition("\\n")[2].replace("\\n", " ")
    ), "no example"
print(time.process_time())
heavy = {{"jax", "grain", "gin", "numpy"}} & set(sys.modules)
rooms = {{m for m in sys.modules if m.startswith("olmo_jax.")}}
rooms = {{m for m in rooms if not m.startswith(("olmo_jax.cli", "olmo_jax.errors"))}}
assert not heavy and not rooms, (heavy, rooms)
"""
    seconds = float(in_a_new_process(code))
    assert seconds < 1.5  # all together; one takes 0.25 s here, start included


def test_the_console_entry_settles_the_process_and_gives_the_status():
    for arguments, status in (["--version"], 0), (["train", "--gin_flie=x"], 2):
        done = subprocess.run(
            [sys.executable, "-c", "from olmo_jax.cli import main; main()", *arguments],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train --gin_flie=configs/demo.gin", "did you mean --gin_file?"),
        ("train --dry_rum", "did you mean --dry_run?"),
        ("train configs/demo.gin", "configs/demo.gin"),
        ("train --gin.Optimzer.learning_rate=1", "did you mean Optimizer?"),
        ("train --gin.Train.steps 5", "--gin.Name.field=value"),
        ("train --gin_file=configs/dmo.gin", "did you mean demo.gin?"),
        ("trian", "train"),
        ("fork runs/demo", "fork --help"),
        ("fork runs/none runs/new --step=x", "--step"),
        ("fork runs/none runs/new", "runs/none"),
        ("convert nowhere out", "nowhere"),
        ("convert nowhere out --to=pt", "--to"),
        ("generate nowhere", "nowhere"),
        ("generate nowhere --max_token=3", "--max_tokens"),
        ("report nowhere", "nowhere"),
        ("report nowhere --baselines=b.json", "nowhere/data.json"),
        ("data inspect 3", "run folder"),
        ("data inspect nowhere 3", "nowhere/config.json"),
        ("data inspect nowhere 3 --gin.Data.seed=1", "unknown option --gin.Data.seed=1"),
        ("data inspect --gin_file=configs/demo.gin x", "number"),
        ("data tokenizer missing.jsonl --out=x.json --vocab_size=300", "missing.jsonl"),
        ("data tokenize missing.jsonl --out=x --tokenizer=missing.json", "missing.json"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(line, expected, capsys):
    assert expected in error_of(line.split(), capsys)


def test_an_interrupt_is_status_130(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("olmo_jax.report.report.write_report", interrupt)
    assert cli.run(["report", "runs/demo"]) == 130
    assert "Traceback" not in capsys.readouterr().err


# --- commands -----------------------------------------------------------------------------------


def test_models_gives_the_exact_parameter_counts(capsys):
    assert cli.run(["models"]) == 0
    out = capsys.readouterr().out
    assert (
        "olmo1_1b" in out and "1.18B" in out and "32.2B" in out and "configs/olmo2/32b.gin" in out
    )


def test_dry_run_prints_a_configuration_that_gives_the_same_again(tmp_path, capsys):
    arguments = ["--gin_file=configs/demo.gin", "--gin.Optimizer.kind=adamw"]
    assert cli.run(["train", *arguments, "--dry_run"]) == 0
    gin, _, text = capsys.readouterr().out.partition("parameters:")
    (tmp_path / "again.gin").write_text(gin)
    again = load_config([str(tmp_path / "again.gin")])
    assert again == load_config(["configs/demo.gin"], ["Optimizer.kind=adamw"])
    assert f"{again.model.parameter_count():,}" in text


def test_dry_run_describes_every_recipe(capsys):
    recipes = [path for path in sorted(ROOT.glob("configs/**/*.gin")) if path.stem != "base"]
    assert len(recipes) > 40
    for path in recipes:
        assert cli.run(["train", f"--gin_file={path.relative_to(ROOT)}", "--dry_run"]) == 0, path
        out, err = capsys.readouterr()
        assert "FLOPs a token:" in out and err == "", path


@pytest.fixture
def documents(tmp_path):
    lines = [
        {"id": f"d{k}", "text": f"The cat number {k} sat on the mat and ate. " * 20}
        for k in range(20)
    ]
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture
def tokens(documents, tmp_path):
    """--gin arguments for a tiny model on tiny token files."""
    tokenizer = tmp_path / "tokenizer.json"
    command = ["data", "tokenizer", str(documents), f"--out={tokenizer}", "--vocab_size=300"]
    assert cli.run(command) == 0
    out = f"--out={tmp_path / 'tokens'}"
    assert cli.run(["data", "tokenize", str(documents), out, f"--tokenizer={tokenizer}"]) == 0
    return [
        "--gin_file=configs/demo.gin",
        f"--gin.Train.tokenizer={tokenizer}",
        f"--gin.Data.paths=('{tmp_path}/tokens/*.npy',)",
        f"--gin.Train.heldout=('{tmp_path}/tokens/*.npy',)",
        "--gin.Model.vocab_size=512",
        "--gin.Data.sequence_length=64",
        "--gin.Data.batch_size=8",
        "--gin.Model.n_layers=1",
        "--gin.Optimizer.kind=adamw",
        "--gin.Model.d_model=32",
        "--gin.Model.n_heads=2",
        "--gin.Model.mlp_width=64",
        "--gin.Train.steps=4",
        "--gin.Train.sample_prompts=('The cat', 'A mat')",
        "--gin.Train.sample_tokens=5",
    ]


def test_inspect_reads_documents_back_from_a_configuration_and_from_a_run(tokens, tmp_path, capfd):
    capfd.readouterr()
    assert cli.run(["data", "inspect", *tokens, "0"]) == 0
    out = capfd.readouterr().out
    assert "sat on the mat" in out and "documents.jsonl" in out

    # A run folder keeps its configuration and its tokenizer.
    run = load_config([tokens[0].partition("=")[2]], [t.removeprefix("--gin.") for t in tokens[1:]])
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(run.as_json()))
    (folder / "tokenizer.json").write_bytes((tmp_path / "tokenizer.json").read_bytes())
    assert cli.run(["data", "inspect", str(folder), "0"]) == 0
    assert capfd.readouterr().out == out

    # Steps of a run count from where it begins in the data's order.
    ahead = [*tokens, "--gin.Train.data_from_step=2"]
    for n, when in {8 * 2: "step 1 (from 1)", 8 * 3 + 7: "step 2", 0: "before the run's"}.items():
        assert cli.run(["data", "inspect", *ahead, str(n)]) == 0
        assert f"(from 0), {when}" in capfd.readouterr().out


def test_samples_that_do_not_fit_the_context_are_refused_before_training(tokens, tmp_path, capsys):
    capsys.readouterr()
    line = ["train", *tokens, f"--gin.Train.run_dir={tmp_path / 'run'}"]
    assert "with Train.sample_tokens = 5000" in error_of(
        [*line, "--gin.Train.sample_tokens=5000"], capsys
    )
    assert "sample_tokens = 0" in error_of([*line, "--gin.Train.sample_tokens=0"], capsys)
    assert not (tmp_path / "run").exists()


def test_train_fork_convert_generate_report(tokens, tmp_path, capfd, monkeypatch):
    run, forked, exported = (str(tmp_path / name) for name in ("run", "forked", "hf"))
    assert cli.run(["train", *tokens, f"--gin.Train.run_dir={run}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert any("heldout/bits_per_byte" in row for row in rows)
    samples = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in samples] == ["The cat", "A mat"]
    # A report that cannot be written is said and is no failure of the run.
    (tmp_path / "run/report.html").unlink()
    (tmp_path / "run/report.html").mkdir()
    capfd.readouterr()
    assert cli.run(["train", *tokens, f"--gin.Train.run_dir={run}"]) == 0
    assert "error: no report: cannot write" in capfd.readouterr().err
    (tmp_path / "run/report.html").rmdir()
    # What the folder keeps is the configuration that ran.
    kept = load_config([f"{run}/config.gin"])
    assert RunConfig.from_json(json.loads((tmp_path / "run/config.json").read_text())) == kept
    assert kept.train.run_dir == run and kept.model.vocab_size == 512

    assert cli.run(["fork", run, forked]) == 0
    changed = [f"--gin.Train.run_dir={forked}", "--gin.Train.steps=4", "--gin.Data.seed=3"]
    assert cli.run(["train", *tokens, *changed]) == 0
    assert cli.run(["convert", run, exported, "--to=hf"]) == 0
    card = (tmp_path / "hf/README.md").read_text()
    bits = next(row["heldout/bits_per_byte"] for row in rows if "heldout/bits_per_byte" in row)
    for line in (
        "# run",
        "| steps | 4 of 4 |",
        "| tokens | 2,048 |",
        f"| bits per byte | {bits:.6g} |",
    ):
        assert f"{line}\n" in card, line
    capfd.readouterr()
    texts = []
    for model in (run, exported):
        options = ["--prompt=The cat", "--max_tokens=8", "--temperature=0"]
        assert cli.run(["generate", model, *options]) == 0
        out, err = capfd.readouterr()
        assert out.startswith("The cat") and "tokens/s" in err
        texts.append(out)
    assert texts[0] == texts[1]
    # Several at once, resumed after a kill in the middle of the second line: the same texts.
    prompts, whole = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text('{"prompt": "The cat"}\n{"prompt": "A"}\n')
    command = ["generate", run, f"--prompts={prompts}", "--max_tokens=8", "--temperature=0"]
    assert cli.run(command) == 0
    lines = capfd.readouterr().out
    assert [json.loads(line)["prompt"] for line in lines.splitlines()] == ["The cat", "A"]
    assert "The cat" + json.loads(lines.splitlines()[0])["text"] == texts[0].removesuffix("\n")
    assert cli.run([*command, f"--out={whole}"]) == 0
    assert whole.read_text() == lines
    whole.unlink()
    monkeypatch.setattr("os.replace", Mock(side_effect=KeyboardInterrupt))
    assert cli.run([*command, f"--out={whole}"]) == 130
    monkeypatch.undo()
    (part,) = tmp_path.glob(".texts.jsonl.*.part")
    part.write_text(lines[:-5])
    assert cli.run([*command, f"--out={whole}"]) == 0
    assert whole.read_text() == lines and not part.exists()
    assert cli.run(["chat", run]) == 2
    assert "has no chat template" in capfd.readouterr().err

    (tmp_path / "b.json").write_text('{"somebody else": 1.25}')
    assert cli.run(["report", run, f"--baselines={tmp_path / 'b.json'}"]) == 0
    assert capfd.readouterr().out.split() == [f"{run}/report.html", f"{run}/batches.html"]
    assert "somebody else" in (tmp_path / "run/report.html").read_text()
