"""Memorisation: what is asked is what was read, repeats are all found, a planted passage shows."""

import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmo_jax import cli
from olmo_jax.cli_study import _heldout, _steps
from olmo_jax.data import DataConfig, Document, open_dataset, write_token_file
from olmo_jax.data.trace import Trace
from olmo_jax.study import occurrences
from olmo_jax.study.memorization import CONTINUATION, LENGTH, PROMPT, _documents, choose
from olmo_jax.study.reading import Place, Places, Ranges, Reading, evenly
from olmo_jax.train.config import RunConfig

VOCAB, T, BATCH, STEPS = 300, 128, 4, 80
PASSAGE = np.random.default_rng(7).permutation(np.arange(1, VOCAB))[: LENGTH + 6]
GIN = """
Model.vocab_size = 300
Model.d_model = 32
Model.n_layers = 1
Model.n_heads = 2
Model.mlp_width = 64
Model.context_length = 128
Data.sequence_length = 128
Data.eos_token_id = 0
Data.batch_size = 4
Optimizer.learning_rate = 0.01
Optimizer.weight_decay = 0.0
Schedule.kind = "constant"
Train.steps = 80
Train.tensorboard = False
"""


def write(path, seed, passage=None, documents=1300, longest=120):
    """Documents of noise, every second one the passage, if there is any."""
    rng, tokens, rows = np.random.default_rng(seed), [], []
    for k in range(documents):
        document = rng.integers(1, VOCAB, rng.integers(20, longest))
        planted = passage is not None and k % 2 == 0
        document = np.append(passage if planted else document, 0)
        start = sum(map(len, tokens))
        name = "planted" if planted else f"noise-{k}"
        rows.append(Document(start, start + len(document), name, "a.jsonl", k + 1))
        tokens.append(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_token_file(path, np.concatenate(tokens), rows, "uint16")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run that reads the passage again and again; `train` adds others."""
    folder = tmp_path_factory.mktemp("memorization")
    (folder / "tiny.gin").write_text(GIN)
    write(folder / "planted/a.npy", 1, PASSAGE)
    train(folder, "planted")
    return folder


def train(folder, name, *more):
    arguments = [
        f"--gin.Data.paths=('{folder}/{name}/*.npy',)",
        f"--gin.Train.run_dir={folder}/runs/{name}",
    ]
    assert cli.run(["train", f"--gin_file={folder}/tiny.gin", *arguments, *more]) == 0


def study(runs, model, *options):
    out = runs / "out" / f"{model}.json"
    command = ["study", "memorization", str(runs / "runs" / model), f"--out={out}"]
    assert cli.run([*command, *options]) == 0
    lines = out.with_suffix(".sequences.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    return json.loads(out.read_text()), items, out.with_suffix(".html").read_text()


def check_passage(runs, model, knows):
    content, items, page = study(
        runs, model, f"--run={runs / 'runs/planted'}", "--documents", "--limit=200"
    )
    planted = [item for item in items if item["documents"] == ["planted"]]
    noise = [item for item in items if item["documents"] != ["planted"]]
    assert len(planted) > 50 and len(noise) > 50
    assert all(item["memorised"] == knows for item in planted)
    assert not any(item["memorised"] for item in noise)
    assert all(item["prompt"] == PASSAGE[:PROMPT].tolist() for item in planted)
    # The passage counts once, however often it was drawn, and with all of its repeats.
    most = content["by repeats"][-1]
    assert most["sequences"] == 1 and most["share"] == knows and most["repeats"][0] > 32
    assert content["read"]["memorised"] == knows and content["not read"]["memorised"] == 0
    # Noise cannot be known: 1 of 300 tokens by chance.
    assert content["not read"]["sequences"] > 50 and content["not read"]["score"] < 0.02
    assert ("None of the sequences." in page) != knows and 'class="band"' in page
    assert ("was trained on other data" in page) != knows


def test_a_model_trained_on_a_passage_has_memorised_it(runs):
    check_passage(runs, "planted", knows=True)


@pytest.mark.slow
def test_a_model_that_never_saw_the_passage_has_not(runs):
    write(runs / "clean/a.npy", 1)
    train(runs, "clean")
    check_passage(runs, "clean", knows=False)


@pytest.mark.slow
def test_the_scores_are_those_of_pythias_program_on_transformers(runs):
    import torch
    from transformers import AutoModelForCausalLM

    hf = runs / "runs/hf"
    assert cli.run(["convert", str(runs / "runs/planted"), str(hf), "--to=hf"]) == 0
    content, items, _ = study(runs, "hf", f"--run={runs / 'runs/planted'}", "--limit=100")
    assert content["trained_steps"] == STEPS and "taken as trained" in content["notes"][0]
    assert 10 < sum(item["memorised"] for item in items) < len(items) - 10
    model = AutoModelForCausalLM.from_pretrained(hf)
    prompts = torch.tensor([item["prompt"] for item in items])
    text = model.generate(prompts, do_sample=False, max_new_tokens=CONTINUATION, eos_token_id=None)
    truth = torch.tensor([item["continuation"] for item in items])
    scores = (text[:, PROMPT:LENGTH] == truth).float().mean(axis=-1)
    assert scores.tolist() == [item["score"] for item in items]


def test_what_was_read_is_told_from_what_comes_next_by_the_batches_of_training(runs):
    _, items, _ = study(runs, "planted", "--limit=100")
    dataset = open_dataset(
        DataConfig(
            paths=(f"{runs}/planted/*.npy",), sequence_length=T, eos_token_id=0, batch_size=BATCH
        ),
        VOCAB,
    )
    batches = [dataset.batch(step) for step in range(STEPS)]
    for group in ("read", "next"):
        assert sum(item["group"] == group for item in items) > (group == "read") * 90
    for item in items:
        tokens = item["prompt"] + item["continuation"]
        if item["group"] == "read":
            row = batches[item["step"] - 1].tokens_BT[item["row"]]
            assert row[:LENGTH].tolist() == tokens
        else:
            assert item["step"] > STEPS
            assert all(item["instance"] not in batch.instance_ids_B for batch in batches)
        # Greedy, and on the model's own tokens.
        hits = np.equal(item["generated"], item["continuation"])
        assert item["score"] == hits.mean() and len(hits) == CONTINUATION


def test_data_that_moved_can_be_named_and_data_that_changed_are_refused(runs, capsys):
    moved = runs / "moved"
    (runs / "planted").rename(moved)
    there = f"--gin.Data.paths=('{moved}/*.npy',)"
    command = ["study", "memorization", str(runs / "runs/planted"), "--limit=10"]
    try:
        assert cli.run(command) == 2
        assert "if they have moved, say where with --gin.Data.paths" in capsys.readouterr().err
        assert study(runs, "planted", "--limit=10", there)[0]["read"]["sequences"] == 10
        content = (moved / "a.npy").read_bytes()
        (moved / "a.npy").write_bytes(content[:-4] + b"\1\0\0\0")
        assert cli.run([*command, there]) == 2
        assert "the data is not what" in capsys.readouterr().err
        (moved / "a.npy").write_bytes(content)
    finally:
        moved.rename(runs / "planted")


@pytest.mark.slow  # trains
def test_a_fork_has_read_what_it_read_itself(runs, capsys):
    new = runs / "runs/forked"
    assert cli.run(["fork", str(runs / "runs/planted"), str(new)]) == 0
    train(runs, "planted", f"--gin.Train.run_dir={new}", f"--gin.Train.steps={STEPS + 6}")
    content, items, _ = study(runs, "forked", "--limit=100")
    read = {item["step"] for item in items if item["group"] == "read"}
    assert read == set(range(STEPS + 1, STEPS + 7))
    assert f"steps 1 to {STEPS} are of {runs / 'runs/planted'}" in content["notes"][0]
    capsys.readouterr()
    assert cli.run(["study", "memorization", str(new), "--steps=80:82"]) == 2
    assert "--steps=80:" in (error := capsys.readouterr().err) and "begins at step 81" in error


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 9)), min_size=1, max_size=6))
def test_steps_are_kept_as_ranges(parts):
    text = ",".join(f"{first}:{first + more}" if more else f"{first}" for first, more in parts)
    steps = sorted({step for first, more in parts for step in range(first, first + more + 1)})
    joined = Ranges(_steps(text, 50))
    assert list(joined) == steps and [joined[i] for i in range(len(joined))] == steps
    assert evenly(joined, 7) == evenly(steps, 7)


def test_steps_of_a_whole_long_run_take_no_memory(tmp_path):
    """Pythia's, with as many instances as can be chosen from."""
    write(tmp_path / "a.npy", 0, documents=40)
    config = DataConfig(paths=(f"{tmp_path}/a.npy",), sequence_length=T, batch_size=1024)
    reading = Reading(Trace(open_dataset(config, VOCAB), 143_000), steps=143_000)
    tracemalloc.start()
    found, _ = choose(reading, steps=_steps("1:143000", 143_000), limit=10)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert [reading.trace.step_and_row(p.n)[0] for p in found["read"]][::9] == [1, 143_000]


def test_only_what_a_run_read_itself_is_read(tmp_path):
    write(tmp_path / "a.npy", 0, documents=40)
    config = DataConfig(paths=(f"{tmp_path}/a.npy",), sequence_length=T, batch_size=2)
    trace = Trace(open_dataset(config, VOCAB), last=9, first=4, data_from_step=1)
    assert Reading(trace, steps=7).read == range(2 * 5, 2 * 8)
    assert len(Reading(trace, steps=3).read) == 0
    assert Reading(trace, steps=3).next.start == 2 * 5


def test_a_study_that_was_interrupted_goes_on_to_the_same_files(runs, monkeypatch):
    from olmo_jax.generate import Engine

    whole = study(runs, "planted", "--limit=120")
    (runs / "out/planted.json").unlink()
    step, calls, submitted = Engine.step, [], []

    def interrupted(engine):
        calls.append(engine)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    command = ["study", "memorization", str(runs / "runs/planted"), "--limit=120"]
    command.append(f"--out={runs / 'out/planted.json'}")
    assert cli.run(command) == 130
    part = (runs / "out/planted.json.part").read_text().splitlines()[1:]
    assert part and not (runs / "out/planted.json").exists()
    monkeypatch.undo()
    submit = Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda e, r: submitted.append(r) or submit(e, r))
    assert study(runs, "planted", "--limit=120") == whole
    prompts = {tuple(item["prompt"]) for item in whole[1]}
    assert len({request.prompt_ids for request in submitted}) == len(prompts) - len(part)
    assert not (runs / "out/planted.json.part").exists()


def test_beyond_what_can_be_counted_the_order_tells_repeats(runs, monkeypatch):
    monkeypatch.setattr(occurrences, "MOST_TOKENS", 0)
    content, items, page = study(runs, "planted", "--limit=120")
    assert not content["repeats_counted"] and "counts whole instances" in page
    assert all(item["repeats"] == (item["group"] == "read") for item in items)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--steps=81", "the run has steps 1 to 80"),
        ("--steps=0", "the run has steps 1 to 80"),
        ("--steps=5:2", "--steps=5:2"),
        ("--offset=65", "Data.sequence_length is 128"),
        ("--offset=3 --documents", "give one of them"),
        ("--limit=0", "--limit=0"),
        ("--out=x.txt", ".json"),
        ("--step=7", "step 7"),
        ("--trained_steps=3", "leave it out"),
        ("--gin.Data.seed=3", "the data is not what"),
        ("--run=nowhere", "nowhere/config.json"),
        ("--gin_file=TINY --gin.Model.vocab_size=400 --gin.Data.paths=OTHER", "token 3"),
    ],
)
def test_a_mistake_is_one_line(runs, options, expected, capsys):
    wide = runs / "wide/a.npy"
    if not wide.exists():
        wide.parent.mkdir()
        write_token_file(wide, np.full(1000, 399), [], "uint16")
    options = options.replace("TINY", str(runs / "tiny.gin")).replace("OTHER", f"('{wide}',)")
    capsys.readouterr()
    assert cli.run(["study", "memorization", str(runs / "runs/planted"), *options.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err


@pytest.mark.parametrize("instances", ["fixed", "packed"])
def test_every_occurrence_of_a_sequence_in_what_was_read_is_counted(tmp_path, instances):
    """Against a look at every window of every instance, in an order that reads some twice."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, 1500)  # few tokens: short sequences come again
    ends = [*range(37, 1500, 37), 1500]
    rows = [Document(a, b, "d", "s", 1) for a, b in zip([0, *ends], ends, strict=False)]
    write_token_file(tmp_path / "a.npy", tokens, rows, "uint8")
    config = DataConfig(
        paths=(str(tmp_path / "a.npy"),), sequence_length=50, instances=instances, batch_size=7
    )
    reading = Reading(Trace(open_dataset(config, 3), 7, data_from_step=1), steps=7)
    windows: Counter = Counter()
    for n in reading.read:
        row = reading.dataset.instance(n)
        text = row.tokens_T[: np.count_nonzero(row.segment_ids_T)].tolist()
        windows.update(tuple(text[i : i + 6]) for i in range(len(text) - 5))
    assert len(reading.read) > len(reading.dataset)
    wanted = [*windows, (3,) * 6]
    assert max(windows.values()) > 5
    assert occurrences.count(reading, wanted) == [*windows.values(), 0]


def test_nothing_that_was_read_is_taken_for_new_in_a_mixture(tmp_path):
    """The smaller source comes round again while the larger one is new; masked documents are no
    one text."""
    write(tmp_path / "a.npy", 0, documents=20, longest=500)
    write(tmp_path / "b.npy", 1, documents=200, longest=500)
    config = DataConfig(
        sources={name: (str(tmp_path / f"{name}.npy"),) for name in "ab"},
        weights={"a": 0.5, "b": 0.5},
        sequence_length=T,
        eos_token_id=0,
        document_masking=True,
    )
    reading = Reading(Trace(open_dataset(config, VOCAB), 10), steps=10)
    read = {reading.dataset.instance_id(n) for n in reading.read}
    found, skipped = choose(reading, limit=60)
    assert {place.instance for place in found["read"]} <= read
    assert found["next"] and not {place.instance for place in found["next"]} & read
    assert skipped and all(0 not in p.tokens[:-1] for p in found["read"] + found["next"])
    chosen, _ = choose(reading, steps=[range(2, 3), range(11, 12)], limit=60)
    assert {reading.trace.step_and_row(p.n)[0] for p in chosen["read"] + chosen["next"]} == {2, 11}
    beginnings = Places(LENGTH, at_documents=True).of(reading.dataset, reading.read)
    for place in beginnings:
        before = reading.dataset.row(place.instance).tokens_T[place.offset - 1]
        assert place.offset > 0 and before == 0


def test_the_documents_of_a_sequence_are_those_of_its_own_tokens(tmp_path):
    """In instances that are packed with ends of long documents, too."""
    lengths = np.random.default_rng(0).integers(5, 300, 60)
    ends = np.cumsum(lengths).tolist()
    tokens = np.repeat(np.arange(1, 61), lengths)  # each tells which document it is of
    rows = [
        Document(b - n, b, f"d{k + 1}", "s", 1)
        for k, (n, b) in enumerate(zip(lengths, ends, strict=True))
    ]
    write_token_file(tmp_path / "a.npy", tokens, rows, "uint16")
    config = DataConfig(
        paths=(f"{tmp_path}/a.npy",), sequence_length=T, instances="packed", batch_size=1
    )
    dataset = open_dataset(config, VOCAB)
    places = [
        Place(n, row.instance_id, offset, tuple(row.tokens_T[offset : offset + LENGTH].tolist()))
        for n in range(len(dataset))
        for row in [dataset.instance(n)]
        for offset in range(0, np.count_nonzero(row.segment_ids_T) - LENGTH + 1, 7)
    ]
    assert len(places) > 50
    for place, ids in zip(places, _documents(dataset, places), strict=True):
        assert ids == [f"d{k}" for k in dict.fromkeys(place.tokens)]


def test_held_out_text_of_a_run_in_the_originals_own_order(tmp_path):
    write(tmp_path / "a.npy", 0, documents=40)
    path = (str(tmp_path / "a.npy"),)
    data = {"paths": path, "order": "olmo", "global_indices": ("i.npy",), "sequence_length": T}
    sizes = {"vocab_size": VOCAB, "d_model": 8, "n_layers": 1, "n_heads": 1, "mlp_width": 8}
    content = {"Model": sizes, "Data": data, "Train": {"heldout": path, "steps": 1}}
    heldout, note = _heldout(RunConfig.from_json(content))
    assert len(heldout) > 0 and note is None


def test_held_out_text_is_the_control_of_a_model_that_has_read_all(tmp_path):
    write(tmp_path / "a.npy", 0, documents=40)
    write(tmp_path / "b.npy", 1, documents=40)
    dataset, heldout = (
        open_dataset(DataConfig(paths=(f"{tmp_path}/{name}.npy",), sequence_length=T), VOCAB)
        for name in "ab"
    )
    trace = Trace(dataset, len(dataset))
    found, _ = choose(Reading(trace, steps=len(dataset)), heldout, limit=10)
    assert [len(places) for places in found.values()] == [10, 0, 10]
    for place in found["held out"]:
        assert tuple(heldout.row(place.instance).tokens_T[:LENGTH]) == place.tokens
    found, _ = choose(Reading(trace, steps=0), limit=10)
    assert [len(places) for places in found.values()] == [0, 10, 0]
