"""Checkpoints of the original OLMo program: the same model, and the same files back."""

import dataclasses
import hashlib
import json
import pickle
import shutil

import numpy as np
import pytest
import yaml

from olmo_jax.convert.export import convert
from olmo_jax.convert.load import load
from olmo_jax.convert.olmo import from_olmo_config, plain_names, to_olmo_config
from olmo_jax.convert.safetensors_io import Planned, SafetensorsFolder, write_folder
from olmo_jax.convert.source import open_source
from olmo_jax.convert.torch_files import TorchTensors
from olmo_jax.convert.torch_write import write_state_dict
from olmo_jax.errors import UserError
from tests.convert.hf_models import OLMO2
from tests.convert.native import FIXTURES, assert_same_logits, sha256, unpacked, variants

VARIANTS = variants("olmo")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return unpacked("olmo", tmp_path_factory.mktemp("original"))


def _copy(checkpoints, name, into):
    (into / name).mkdir()
    for file in ("config.yaml", "model.pt", "logits.npz"):
        shutil.copy(checkpoints / name / file, into / name)
    return into / name


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_the_original_s(checkpoints, name):
    assert_same_logits(load(checkpoints / name), checkpoints / name)


def test_the_comparison_can_fail(checkpoints, tmp_path):
    for name, field, value in (
        ("olmo2", "rope_theta", 600_000),
        ("olmo2", "layer_norm_eps", 1e-3),
        ("olmo1_clip", "clip_qkv", None),
        ("biased", "layer_norm_eps", 1e-3),
    ):
        folder = _copy(checkpoints, name, tmp_path)
        content = yaml.safe_load((folder / "config.yaml").read_text())
        content["model"][field] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(AssertionError):
            assert_same_logits(load(folder), folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_keeps_every_tensor_and_the_model(checkpoints, tmp_path, name):
    convert(checkpoints / name, tmp_path / "out", "olmo")
    before = TorchTensors(checkpoints / name, "model.pt")
    after = TorchTensors(tmp_path / "out", "model.pt")
    names = plain_names(before.names())  # blocks in groups are written one by one
    assert after.names() == set(names)
    for new, old in names.items():
        assert after.shape(new) == before.shape(old), new
        assert after.dtype(new) == before.dtype(old), new
        assert after.read(new).tobytes() == before.read(old).tobytes(), new
    with open_source(checkpoints / name) as first, open_source(tmp_path / "out") as second:
        same = {"n_kv_heads": first.config.kv_heads}
        assert second.config == dataclasses.replace(first.config, **same)
        assert second.eos_token_id == first.eos_token_id
        assert second.files == first.files
    model = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["model"]
    given = yaml.safe_load((checkpoints / name / "config.yaml").read_text())["model"]
    equal = {"n_kv_heads", "multi_query_attention", "mlp_ratio", "mlp_hidden_size", "init_std"}
    for field in set(model) - equal - {"init_cutoff_factor", "block_group_size", "precision"}:
        if given[field] is not None:
            assert model[field] == given[field], field


def test_bfloat16_stays_bfloat16(checkpoints, tmp_path):
    folder = _copy(checkpoints, "olmo2", tmp_path)
    tensors = TorchTensors(folder, "model.pt")

    def planned(name):
        return Planned(name, tensors.shape(name), "bfloat16", lambda: tensors.read(name))

    write_state_dict(tmp_path / "half.pt", [planned(n) for n in sorted(tensors.names())])
    (tmp_path / "half.pt").replace(folder / "model.pt")
    convert(folder, tmp_path / "out", "olmo")
    before, after = TorchTensors(folder, "model.pt"), TorchTensors(tmp_path / "out", "model.pt")
    for name in before.names():
        assert after.dtype(name) == "bfloat16"
        assert after.read(name).tobytes() == before.read(name).tobytes(), name


@pytest.mark.parametrize("name", ["olmo1_tied", "olmo1_clip", "olmo1_mqa", "olmo2", "olmo2_gqa"])
def test_transformers_folder_is_the_original_converter_s(checkpoints, tmp_path, name):
    """Its tensors by name, shape, type and checksum; its config but for fields of no meaning."""
    convert(checkpoints / name, tmp_path / "out", "hf")
    want = json.loads((checkpoints / name / "hf.json").read_text())
    ours = SafetensorsFolder(tmp_path / "out")
    got = {
        n: [
            list(ours.shape(n)),
            ours.dtype(n),
            hashlib.sha256(ours.read(n).tobytes()).hexdigest(),
        ]
        for n in ours.names()
    }
    assert got == want["tensors"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for field, value in want["config"].items():
        if field != "transformers_version":
            assert config[field] == value, field


@pytest.mark.parametrize("name", VARIANTS)
def test_ai2_olmo_itself_loaded_what_we_write(checkpoints, tmp_path, name):
    """The files have the checksums of those that tests/oracles/check_olmo.py had it load."""
    verified = json.loads((FIXTURES / "verified_olmo.json").read_text())["checkpoints"][name]
    assert verified["difference"] < 1e-5
    convert(checkpoints / name, tmp_path / "out", "olmo")
    assert sha256(tmp_path / "out/config.yaml", tmp_path / "out/model.pt") == verified["sha256"]


def test_ai2_olmo_s_own_safetensors(checkpoints, tmp_path):
    """Its names are pickles in base64; plain ones are read as well."""
    folder = tmp_path / "in"
    shutil.copytree(checkpoints / "olmo2", folder)
    (folder / "model.pt").unlink()
    assert all("." not in name for name in SafetensorsFolder(folder).names())
    assert_same_logits(load(folder), folder)


def test_a_name_with_code_in_it_is_refused(checkpoints, tmp_path, monkeypatch):
    import base64
    import os

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = _copy(checkpoints, "olmo2", tmp_path)
    (folder / "model.pt").unlink()
    name = base64.urlsafe_b64encode(pickle.dumps(((Bomb(),), False))).decode()
    write_folder(folder, [Planned(name, (1,), "float32", lambda: np.ones(1, "f4"))], 10**9)
    with pytest.raises(UserError, match=r"tensor's name: its pickle names posix\.system"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_hf_olmo_folders(checkpoints, tmp_path):
    """What the hf_olmo package keeps: the same names behind "model.", the same fields in JSON."""
    tensors = TorchTensors(checkpoints / "olmo2_gqa", "model.pt")

    def planned(name):
        return Planned(f"model.{name}", tensors.shape(name), "float32", lambda: tensors.read(name))

    write_state_dict(tmp_path / "pytorch_model.bin", [planned(n) for n in sorted(tensors.names())])
    fields = yaml.safe_load((checkpoints / "olmo2_gqa" / "config.yaml").read_text())["model"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hf_olmo"} | fields))
    assert_same_logits(load(tmp_path), checkpoints / "olmo2_gqa")


GIVEN = to_olmo_config(OLMO2)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"scale_logits": True}, "scale_logits"),
        ({"embedding_layer_norm": True}, "embedding_layer_norm"),
        ({"block_type": "llama"}, "block_type"),
        ({"block_type": "moe", "moe_top_k": 8}, "moe_top_k"),
        ({"activation_type": "relu"}, "activation_type"),
        ({"rope": False}, "rope = False, alibi = False"),
        ({"alibi": True, "rope": False, "n_heads": 4, "alibi_bias_max": 4.0}, "alibi_bias_max"),
        ({"include_bias": True, "bias_for_layer_norm": None}, "bias_for_layer_norm"),
        ({"bias_for_layer_norm": True}, "bias_for_layer_norm"),
        ({"include_bias": True}, "head has no bias"),
        ({"attention_layer_norm_with_affine": False}, "attention_layer_norm_with_affine"),
        ({"layer_norm_with_affine": False, "attention_layer_norm": False}, "layer_norm_type"),
        ({"n_heads": 5}, "n_heads"),
        ({"d_model": "wide"}, "d_model"),
    ],
)
def test_what_ours_cannot_say_is_named(fields, named):
    with pytest.raises(UserError, match=f"x.yaml: .*{named}") as error:
        from_olmo_config(GIVEN | fields, "x.yaml")
    assert "\n" not in str(error.value)


def test_defaults_and_text_numbers():
    """Fields that a hand-written file leaves out, and 1e-5, which YAML reads as text."""
    config = from_olmo_config({"rope": True, "layer_norm_eps": "1e-5", "include_bias": False}, "x")
    assert (config.d_model, config.mlp_width, config.rows) == (768, 1536, 50304)
    assert config.norm_eps == 1e-5 and config.norm == "layer" and config.tie_embeddings


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"window_pattern": (4, 4, 0)}, "window_pattern"),
        ({"rope_fraction": 0.5}, "rope_fraction"),
        ({"parallel_residual": True}, "parallel_residual"),
        ({"mlp": "gelu_tanh"}, "gelu_tanh"),
        ({"head_dim": 32}, "head_width"),
        ({"bias": True}, "bias without tie_embeddings"),
    ],
)
def test_what_the_original_cannot_say_is_refused(fields, named):
    with pytest.raises(UserError, match=named):
        to_olmo_config(dataclasses.replace(OLMO2, **fields))


def test_wrong_folders_are_named(checkpoints, tmp_path):
    folder = _copy(checkpoints, "olmo2", tmp_path)

    def refused(message):
        with pytest.raises(UserError, match=message) as error:
            convert(folder, tmp_path / "out", "olmo")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    def rewrite(change):
        tensors = TorchTensors(checkpoints / "olmo2", "model.pt")
        arrays = {n: np.array(tensors.read(n)) for n in tensors.names()}
        change(arrays)
        write_state_dict(
            folder / "model.pt",
            [Planned(n, a.shape, "float32", lambda a=a: a) for n, a in arrays.items()],
        )

    rewrite(lambda a: a.pop("transformer.ln_f.weight"))
    refused(r"1 missing \['transformer\.ln_f\.weight'\]")
    rewrite(lambda a: a.update(more=np.ones(2)))
    refused(r"1 unexpected \['more'\]")
    rewrite(lambda a: a.update({"transformer.ln_f.weight": np.ones(3)}))
    refused(r"transformer\.ln_f\.weight has shape \(3,\)")
    whole = (checkpoints / "olmo2" / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(whole[: len(whole) // 2])
    refused(r"model\.pt: is cut short")
    (folder / "model.pt").unlink()
    refused("has neither model.pt nor model.safetensors")
    (folder / "model").mkdir()
    refused("unshard.py")
    (folder / "config.yaml").write_text("model: [1, 2")
    refused(r"config\.yaml: has no `model`")
    (folder / "config.yaml").write_text("model: !!python/object/apply:os.system ['true']")
    refused(r"config\.yaml: has no `model`")
