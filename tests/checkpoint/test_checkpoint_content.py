"""What is saved is what is restored, or is refused; and retention keeps what it promised."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_worker import CONFIG, abstract, identical, make_state
from pydantic import ValidationError

from olmo_jax.checkpoint import CheckpointConfig, Checkpointer, CheckpointReader, RunFolder
from olmo_jax.errors import UserError


def save(folder: Path, *steps: int, **options) -> Checkpointer:
    with Checkpointer(folder, CONFIG, files={"tokenizer.json": b'{"a": 1}'}) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"data_position": 7 * step}, **options)
    return checkpointer


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two_steps")
    save(folder, 3, 20)
    return folder


def test_state_metadata_and_files_come_back_bit_for_bit(two_steps):
    reader = CheckpointReader(two_steps)
    assert reader.latest() == 20
    state = make_state(20)
    assert identical(reader.restore(20, abstract(state)), state)
    metadata = reader.metadata(20)
    assert (metadata["step"], metadata["data_position"], metadata["permanent"]) == (20, 140, True)
    assert reader.read_file(20, "tokenizer.json") == b'{"a": 1}'


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = make_state(5, rows=200_000)
    kept = jax.tree.map(lambda x: np.array(x, copy=True), state)
    with Checkpointer(tmp_path, CONFIG) as checkpointer:
        checkpointer.save(5, state, {})
        state = jax.block_until_ready(overwrite(state))
    restored = checkpointer.restore(5, abstract(kept))
    assert identical(jax.tree.map(np.asarray, restored), kept)


def test_weights_are_read_without_the_optimizer_state(two_steps, tmp_path):
    damaged = copy(two_steps, tmp_path)
    for file in (damaged / "step20" / "train_state").rglob("*"):
        if file.is_file():
            file.unlink()
    reader = CheckpointReader(damaged)
    params = make_state(20).params
    assert identical(reader.restore(20, {"params": abstract(params)}), {"params": params})
    sliced = reader.tensors(20)["layers/mlp/up"][1].read().result()
    assert np.array_equal(sliced, params["layers"]["mlp"]["up"][1])


def test_a_flip_in_any_file_is_refused_naming_the_older_one(two_steps, tmp_path):
    folder = copy(two_steps, tmp_path)
    reader = CheckpointReader(folder)
    files = [path for path in (folder / "step20").rglob("*") if path.is_file()]
    assert len(files) > 10
    for file in files:
        whole = file.read_bytes()
        broken = bytearray(whole)
        broken[len(whole) // 2] ^= 0x10
        file.write_bytes(broken)
        name = file.relative_to(folder / "step20").as_posix()
        with pytest.raises(UserError, match=r"step20 is damaged.*take step 3"):
            reader.read_file(20, name) if "/" not in name else reader.restore(
                20, abstract(make_state(20))
            )
        file.write_bytes(whole[:-1])
        with pytest.raises(UserError, match=r"step20 is damaged.*take step 3"):
            reader.restore(20, abstract(make_state(20)))
            reader.read_file(20, "tokenizer.json")
        file.write_bytes(whole)
    assert identical(reader.restore(20, abstract(make_state(20))), make_state(20))


def test_no_flip_in_the_manifest_lets_damage_pass(two_steps, tmp_path):
    folder = copy(two_steps, tmp_path)
    reader = CheckpointReader(folder)
    data = max((folder / "step20" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[::-1])
    manifest = folder / "step20" / "manifest.json"
    whole = manifest.read_bytes()
    for position in range(0, len(whole), 37):
        broken = bytearray(whole)
        broken[position] ^= 1
        manifest.write_bytes(broken)
        with pytest.raises(UserError, match="damaged"):
            reader.tensors(20)


def test_half_written_ones_are_passed_over_with_a_warning(two_steps, tmp_path, caplog):
    folder = copy(two_steps, tmp_path)
    (folder / "step25").mkdir()
    (folder / "step22" / "params").mkdir(parents=True)
    (folder / "step20.damaged").mkdir()
    with caplog.at_level(logging.WARNING):
        assert CheckpointReader(folder).latest() == 20
    assert "step22" in caplog.text and "step25" in caplog.text
    assert "taking step 20" in caplog.text
    with Checkpointer(folder, CONFIG) as checkpointer:
        checkpointer.save(25, make_state(25), {})  # a half-written one does not stand in the way
    assert CheckpointReader(folder).steps() == [3, 20, 25]


def test_an_uncommitted_save_is_not_the_latest(tmp_path):
    with Checkpointer(tmp_path, CONFIG) as checkpointer:
        checkpointer.save(5, make_state(5), {})
        checkpointer.wait()
        checkpointer.save(10, make_state(10, rows=500_000), {})
        assert checkpointer.latest() == 5
        assert checkpointer.steps() == [5]
    assert checkpointer.latest() == 10


def test_retention_keeps_its_promise_at_every_removal(tmp_path, monkeypatch):
    seen = []
    remove = Checkpointer._remove

    def watched(self, step):
        before = self.steps()
        remove(self, step)
        seen.append((step, before, self.steps()))

    monkeypatch.setattr(Checkpointer, "_remove", watched)
    checkpointer = save(tmp_path, *[step for step in range(46) if CONFIG.is_due(step)])
    assert [step for step, _, _ in seen] == [5, 10, 15, 25, 30]
    for step, before, after in seen:
        assert len([other for other in before if other > step]) >= CONFIG.keep_ephemeral
        assert set(before) - set(after) == {step}
    assert checkpointer.steps() == [3, 20, 35, 40, 45]


def test_a_checkpoint_declared_permanent_stays(tmp_path):
    save(tmp_path, 7, permanent=True)
    save(tmp_path, 5, 10, 15, 25)
    assert CheckpointReader(tmp_path).steps() == [7, 15, 25]


def test_a_complete_step_is_not_saved_again(tmp_path):
    save(tmp_path, 5)
    before = (tmp_path / "step5" / "manifest.json").stat().st_mtime_ns
    save(tmp_path, 5)
    assert (tmp_path / "step5" / "manifest.json").stat().st_mtime_ns == before


def test_another_state_is_refused_with_the_first_difference(two_steps):
    reader = CheckpointReader(two_steps)
    other = make_state(20, rows=65)
    with pytest.raises(UserError, match=r"embed/weight: saved float32\[64, 16\], asked for .*65"):
        reader.restore(20, abstract(other))
    more = make_state(20)
    more.params["extra"] = jnp.zeros(3)
    with pytest.raises(UserError, match="params/extra: saved nothing"):
        reader.restore(20, {"params": abstract(more.params)})
    with pytest.raises(UserError, match=r"no complete checkpoint of step 4.*complete steps: 3, 20"):
        reader.restore(4, abstract(other))


def test_restores_onto_another_mesh(two_steps):
    worker = Path(__file__).with_name("checkpoint_worker.py")
    command = [sys.executable, str(worker), "on_mesh", str(two_steps), "20"]
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    output = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert json.loads(output.stdout) == {"devices": 4, "identical": True}


@pytest.mark.parametrize(
    "fields",
    [{"every": 0}, {"every": 10, "ephemeral_every": 10}, {"fixed_steps": (-1,)}, {"evry": 3}],
)
def test_impossible_configurations_are_refused(fields):
    with pytest.raises(ValidationError):
        CheckpointConfig(**fields)


def test_run_folder_writes_whole_files_or_nothing(tmp_path):
    run = RunFolder(tmp_path / "a" / "run")
    run.open_for_writing()
    run.write_text(run.config_json, "old")
    run.data_json.mkdir()  # in the way: the write must fail and leave nothing behind
    with pytest.raises(UserError, match=r"data\.json"):
        run.write_text(run.data_json, "new")
    assert sorted(path.name for path in run.path.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "data.json",
    ]
    assert run.config_json.read_text() == "old"


def test_a_conversion_into_the_run_folder_that_was_killed_is_not_in_the_way(tmp_path):
    run = RunFolder(tmp_path)
    (tmp_path / ".hf.77.tmp").mkdir()  # what `olmo-jax convert RUN RUN/hf` builds
    (tmp_path / ".config.json.77.tmp").write_text("{")  # half a small file
    run.open_for_writing()
    assert [path.name for path in tmp_path.glob(".*.tmp")] == [".hf.77.tmp"]


def test_run_folder_refuses_a_file_and_a_second_process(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        RunFolder(tmp_path / "file").open_for_writing()
    with pytest.raises(UserError, match="not a folder"):
        RunFolder(tmp_path / "file" / "run").open_for_writing()
    RunFolder(tmp_path / "run").open_for_writing()
    RunFolder(tmp_path / "run").open_for_writing()  # the same process may
    worker = Path(__file__).with_name("checkpoint_worker.py")
    command = [sys.executable, str(worker), "claim", str(tmp_path / "run")]
    other = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "another process is writing the run folder" in other.stdout


def copy(folder: Path, to: Path) -> Path:
    subprocess.run(["cp", "-r", f"{folder}/.", str(to)], check=True)
    return to
