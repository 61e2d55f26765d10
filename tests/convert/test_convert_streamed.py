"""Conversion through every format keeps bytes, refuses what is damaged, and leaves no halves."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Olmo2Config

import olmo_jax
from olmo_jax.checkpoint import find_checkpoint
from olmo_jax.convert.export import convert
from olmo_jax.convert.safetensors_io import SafetensorsFolder
from olmo_jax.errors import UserError
from olmo_jax.model.transformer import parameters


def theirs(dtype=torch.bfloat16, layers=3):
    torch.manual_seed(0)
    config = Olmo2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        eos_token_id=3,
        pad_token_id=255,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A sharded bfloat16 transformers folder."""
    path = tmp_path_factory.mktemp("theirs") / "hf"
    theirs().save_pretrained(path, max_shard_size="100KB")
    return path


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    files = SafetensorsFolder(folder)
    return {n: (files.dtype(n), files.shape(n), files.read(n).tobytes()) for n in files.names()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_round_trip_keeps_every_byte(tmp_path, dtype):
    theirs(getattr(torch, dtype)).save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "ours", "orbax", verify=True)
    assert report and report.startswith("verified: 36 tensors")
    convert(tmp_path / "ours", tmp_path / "b", "hf", verify=True)
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert before == after
    assert {kind for kind, _, _ in after.values()} == {dtype}
    reader, step = find_checkpoint(tmp_path / "ours")
    kinds = {entry["dtype"] for entry in reader.metadata(step)["arrays"].values()}
    assert kinds == {dtype}
    loaded = olmo_jax.load(tmp_path / "ours")
    same = jax.tree.map(
        np.array_equal, parameters(loaded), parameters(olmo_jax.load(tmp_path / "a"))
    )
    assert all(jax.tree.leaves(same))


def test_another_type_is_written_rounded_and_verified_so(folder, tmp_path):
    convert(folder, tmp_path / "f32", "orbax", dtype="float32", verify=True)
    convert(tmp_path / "f32", tmp_path / "f16", "hf", dtype="float16", verify=True)
    assert {kind for kind, _, _ in tensors(tmp_path / "f16").values()} == {"float16"}


@pytest.mark.parametrize("shards", [1, 3])
def test_pytorch_bin_is_read_as_safetensors_are(folder, tmp_path, shards):
    state = theirs().state_dict()
    (tmp_path / "bin").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "bin")
    names, index = sorted(state), {}
    for i in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i}.bin"
        torch.save({name: state[name] for name in names[i::shards]}, tmp_path / "bin" / file)
        index |= dict.fromkeys(names[i::shards], file)
    if shards > 1:
        content = json.dumps({"metadata": {}, "weight_map": index})
        (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(content)
    convert(tmp_path / "bin", tmp_path / "hf", "hf")
    assert tensors(tmp_path / "hf") == tensors(folder)


def missing_shard(path: Path) -> str:
    file = sorted(path.glob("model-*"))[1]
    file.unlink()
    return file.name


def truncated(path: Path) -> str:
    file = sorted(path.glob("model-*"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    return rf"{file.name}: is cut short: \S+ ends"


def extra_tensor(path: Path) -> str:
    file = sorted(path.glob("model-*"))[0]
    save_file(load_file(file) | {"model.layers.0.surprise": torch.zeros(3)}, file)
    return r"1 unexpected \['model.layers.0.surprise'\]"


def wrong_shape(path: Path) -> str:
    for file in path.glob("model-*"):
        state = load_file(file)
        if "model.norm.weight" in state:
            save_file(state | {"model.norm.weight": torch.ones(65)}, file)
    return r"model.norm.weight has shape \(65,\), its config says \(64,\)"


def unknown_architecture(path: Path) -> str:
    content = json.loads((path / "config.json").read_text()) | {"model_type": "gpt2"}
    (path / "config.json").write_text(json.dumps(content))
    return "model_type = 'gpt2'"


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def pickle_with_code(path: Path) -> str:
    for file in path.glob("model*"):
        file.unlink()
    torch.save({"model.norm.weight": Code()}, path / "pytorch_model.bin")
    return r"pytorch_model.bin: .*(system|posix)"


def plain_pickle_with_code(path: Path) -> str:
    for file in path.glob("model*"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Code()))
    return "pytorch_model.bin"


@pytest.mark.parametrize("to", ["hf", "orbax"])
@pytest.mark.parametrize(
    "damage",
    [
        missing_shard,
        truncated,
        extra_tensor,
        wrong_shape,
        unknown_architecture,
        pickle_with_code,
        plain_pickle_with_code,
    ],
)
def test_a_wrong_input_is_one_line_and_leaves_no_folder(folder, tmp_path, monkeypatch, damage, to):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "in")
    wanted = damage(tmp_path / "in")
    with pytest.raises(UserError, match=wanted) as caught:
        convert(tmp_path / "in", tmp_path / "out", to)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_verification_finds_one_changed_bit(folder, tmp_path, monkeypatch):
    from olmo_jax.convert import export, hf_files

    def write_and_damage(path, source, options):
        hf_files.write(path, source, options)
        file = path / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    monkeypatch.setitem(export.FORMATS, "hf", write_and_damage)
    with pytest.raises(UserError, match=r"verification failed: .* the source's values"):
        convert(folder, tmp_path / "out", "hf", verify=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_progress_tells_of_writing_and_then_of_verifying(folder, tmp_path, to):
    told = []
    convert(folder, tmp_path / "out", to, verify=True, progress=lambda *p: told.append(p))
    size = sum(len(content) for _, _, content in tensors(folder).values())
    assert told[-1] == (2 * size, 2 * size) and {total for _, total in told} == {2 * size}
    assert (size, 2 * size) in told
    done = [done for done, _ in told]
    assert done == sorted(done)


def test_an_interrupted_conversion_leaves_nothing(folder, tmp_path):
    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", "orbax", progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_soup_is_written_streamed(folder, tmp_path):
    other = theirs(torch.float32)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn_like(weight))
    other.save_pretrained(tmp_path / "other")
    convert([folder, tmp_path / "other"], tmp_path / "soup", "orbax")
    a, b, mean = (
        parameters(olmo_jax.load(p)) for p in (folder, tmp_path / "other", tmp_path / "soup")
    )
    jax.tree.map(lambda m, x, y: np.testing.assert_array_equal(m, (x + y) / 2), mean, a, b)
    theirs(layers=2).save_pretrained(tmp_path / "shallow")
    with pytest.raises(UserError, match=r"shallow: is another model: .* has shape"):
        convert([folder, tmp_path / "shallow"], tmp_path / "refused", "hf")
    assert not (tmp_path / "refused").exists()


ON_A_MESH = """
    import sys, jax, numpy as np, olmo_jax
    from olmo_jax.convert.load import load_sharded
    from olmo_jax.model.transformer import abstract_model, parameter_axes, parameters
    from olmo_jax.parallel.mesh import MeshConfig, build_mesh
    from olmo_jax.parallel.sharding import weight_sharding

    model = olmo_jax.load(FOLDER)
    mesh = build_mesh(MeshConfig(fsdp=2, tensor=2))
    shardings = jax.tree.map(
        lambda p, a: weight_sharding(mesh, a, p.shape),
        parameters(model), parameter_axes(model), is_leaf=lambda a: isinstance(a, tuple),
    )
    placed = load_sharded([FOLDER], model.config, shardings)
    jax.tree.map(np.testing.assert_array_equal, placed, parameters(model))
    assert jax.tree.map(lambda a: a.sharding, placed) == shardings
    quarters = [a for a in jax.tree.leaves(placed)
                if 4 * a.addressable_shards[0].data.size == a.size]
    print(len(quarters))
"""


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_weights_go_straight_onto_a_mesh(folder, tmp_path, form):
    if form == "orbax":
        convert(folder, tmp_path / "orbax", "orbax")
        folder = tmp_path / "orbax"
    code = textwrap.dedent(ON_A_MESH).replace("FOLDER", repr(str(folder)))
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) == 9  # every matrix and table: a device holds a quarter


def test_the_small_files_and_the_eos_travel_along(folder, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(folder, source)
    generation = {"eos_token_id": 3, "pad_token_id": 255, "max_new_tokens": 77}
    (source / "generation_config.json").write_text(json.dumps(generation))
    convert(source, tmp_path / "ours", "orbax")
    convert(tmp_path / "ours", tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == generation
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (3, 255)


def test_the_eos_of_the_first_olmos_is_put_right():
    from olmo_jax.convert.source import repaired_eos
    from olmo_jax.model.presets import preset

    assert repaired_eos(preset("olmo1_7b"), 0) == 50279
    assert repaired_eos(preset("olmo1_7b"), 50279) == 50279
    assert repaired_eos(preset("olmo2_1b"), 0) == 0
