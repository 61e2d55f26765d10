"""OLMo-core's checkpoints: the same model, and the same tensors back."""

import copy
import dataclasses
import json
import os
import pickle
import shutil

import jax
import numpy as np
import pytest

from olmo_jax.convert.core_config import to_core_config
from olmo_jax.convert.distcp import DistcpTensors
from olmo_jax.convert.export import convert
from olmo_jax.convert.load import load, load_sharded
from olmo_jax.convert.olmo_core import from_core_config
from olmo_jax.convert.source import open_source
from olmo_jax.errors import UserError
from olmo_jax.model.transformer import parameters
from tests.convert.hf_models import OLMO2
from tests.convert.native import FIXTURES, assert_same_logits, sha256, unpacked, variants

VARIANTS = variants("olmo_core")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return unpacked("olmo_core", tmp_path_factory.mktemp("original"))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_the_original_s(checkpoints, name):
    assert_same_logits(load(checkpoints / name), checkpoints / name)


def _changed(checkpoints, name, into, change):
    folder = into / name
    shutil.copytree(checkpoints / name, folder)
    content = json.loads((folder / "config.json").read_text())
    change(content["model"])
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def _window(model, size):
    for block in (model["block"], *model["block_overrides"].values()):
        block["sequence_mixer"]["sliding_window"]["pattern"][0] = size


def _scaling(model, field, value):
    for block in model["block_overrides"].values():
        block["sequence_mixer"]["rope"]["scaling"][field] = value


@pytest.mark.parametrize(
    "name, change",
    [
        ("olmo3_yarn", lambda m: _window(m, 5)),
        ("olmo3_yarn", lambda m: _window(m, 3)),
        ("olmo3_yarn", lambda m: _scaling(m, "factor", 7.0)),
        ("olmo3_yarn", lambda m: _scaling(m, "old_context_len", 1000)),
        ("llama3", lambda m: _scaling(m, "factor", 3.0)),
        ("olmoe", lambda m: m["block"]["sequence_mixer"]["rope"].update(theta=20_000)),
        (
            "olmoe_normalized",
            lambda m: m["block"]["feed_forward_moe"]["router"].pop("normalize_expert_weights"),
        ),
        ("flexolmo", lambda m: m["block"]["feed_forward_moe"]["router"].update(top_k=1)),
    ],
)
def test_the_comparison_can_fail(checkpoints, tmp_path, name, change):
    folder = _changed(checkpoints, name, tmp_path, change)
    with pytest.raises(AssertionError):
        assert_same_logits(load(folder), folder)


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_keeps_every_tensor_and_the_model(checkpoints, tmp_path, name):
    convert(checkpoints / name, tmp_path / "out", "olmo_core", max_shard_bytes=10_000)
    before = DistcpTensors(checkpoints / name / "model_and_optim")
    after = DistcpTensors(tmp_path / "out" / "model_and_optim")
    assert after.names() == before.names()
    for tensor in before.names():
        # What drops tokens is written as what does not, with its own layout of these two.
        if name == "not_dropless" and tensor.endswith((".w1", ".w3")):
            continue
        assert after.shape(tensor) == before.shape(tensor), tensor
        assert after.dtype(tensor) == before.dtype(tensor), tensor
        assert after.read(tensor).tobytes() == before.read(tensor).tobytes(), tensor
        rows = slice(1, 5)
        assert before.read(tensor, rows).tobytes() == before.read(tensor)[rows].tobytes(), tensor
    with open_source(checkpoints / name) as first, open_source(tmp_path / "out") as second:
        same = {"n_kv_heads": first.config.kv_heads}
        assert second.config == dataclasses.replace(first.config, **same)
        assert (second.eos_token_id, second.files) == (first.eos_token_id, first.files)
    assert_same_logits(load(tmp_path / "out"), checkpoints / name)


@pytest.mark.parametrize("name", ["olmoe", "olmo3_yarn", "tied"])
def test_round_trip_through_our_own_checkpoint(checkpoints, tmp_path, name):
    convert(checkpoints / name, tmp_path / "ours", "orbax")
    assert_same_logits(load(tmp_path / "ours"), checkpoints / name)
    convert(tmp_path / "ours", tmp_path / "out", "olmo_core")
    before = DistcpTensors(checkpoints / name / "model_and_optim")
    after = DistcpTensors(tmp_path / "out" / "model_and_optim")
    assert after.names() == before.names()
    for tensor in before.names():
        assert after.dtype(tensor) == before.dtype(tensor), tensor
        assert after.read(tensor).tobytes() == before.read(tensor).tobytes(), tensor


def test_experts_straight_onto_devices(checkpoints):
    """Layer by layer and expert by expert; a router has no expert axis to go along."""
    with open_source(checkpoints / "olmoe") as source:
        config = source.config
    want = parameters(load(checkpoints / "olmoe"))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    got = load_sharded([checkpoints / "olmoe"], config, jax.tree.map(lambda _: here, want))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", VARIANTS)
def test_olmo_core_itself_loaded_what_we_write(checkpoints, tmp_path, name):
    """The files have the checksums of those that tests/oracles/check_olmo_core.py had it load."""
    verified = json.loads((FIXTURES / "verified_olmo_core.json").read_text())["checkpoints"][name]
    assert verified["difference"] < 1e-5
    convert(checkpoints / name, tmp_path / "out", "olmo_core")
    weights = sorted((tmp_path / "out" / "model_and_optim").iterdir())
    assert sha256(tmp_path / "out" / "config.json", *weights) == verified["sha256"]


def test_tensors_in_parts_and_in_several_files(checkpoints):
    """The fixtures do hold what two processes wrote, and more than one file a process."""
    weights = checkpoints / "olmo2_fsdp" / "model_and_optim"
    assert {f.name[:4] for f in weights.glob("*.distcp")} == {"__0_", "__1_"}
    assert len(list((checkpoints / "tied" / "model_and_optim").glob("*.distcp"))) == 3


def test_dtype_of_choice(checkpoints, tmp_path):
    convert(checkpoints / "olmoe", tmp_path / "out", "olmo_core", dtype="bfloat16")
    before = DistcpTensors(checkpoints / "olmoe" / "model_and_optim")
    after = DistcpTensors(tmp_path / "out" / "model_and_optim")
    for name in before.names():  # the fixtures' values are bfloat16's
        assert after.dtype(name) == "bfloat16"
        np.testing.assert_array_equal(after.read(name).astype(np.float32), before.read(name))


GIVEN = {"model": to_core_config(OLMO2, "float32")}


def _with(path: str, value) -> dict:
    content = copy.deepcopy(GIVEN)
    *keys, last = path.split("/")
    node = content["model"]
    for key in keys:
        node = node[key]
    node[last] = value
    return content


@pytest.mark.parametrize(
    "path, value, named",
    [
        ("name", "normalized", "model.name = 'normalized'"),
        ("embed_scale", 2.0, "model.embed_scale"),
        ("embedding_norm", {"name": "rms"}, "model.embedding_norm"),
        ("block_pattern", ["a"], "model.block_pattern"),
        ("block/name", "peri_norm", "block.name = 'peri_norm'"),
        ("block/attention_residual_alpha", 0.5, "block.attention_residual_alpha"),
        ("block/sequence_mixer/type", "gated_delta_net", "sequence_mixer.type"),
        ("block/sequence_mixer/name", "fused", "attention.name = 'fused'"),
        ("block/sequence_mixer/use_head_qk_norm", True, "attention.use_head_qk_norm"),
        ("block/sequence_mixer/attention_sinks", True, "attention.attention_sinks"),
        ("block/sequence_mixer/rope/name", "complex", "rope.name = 'complex'"),
        ("block/sequence_mixer/rope/no_global_rope", True, "rope.no_global_rope"),
        ("block/sequence_mixer/rope/scaling", {"_CLASS_": "x.Y"}, "rope.scaling of class 'Y'"),
        ("block/layer_norm/name", "l2_norm", "block.layer_norm.name = 'l2_norm'"),
        ("block/layer_norm/eps", 1e-3, "norms of several kinds"),
        ("block/feed_forward/activation", "gelu_tanh", "feed_forward.activation"),
        ("block/feed_forward/bias", True, "feed_forward.bias"),
        ("lm_head/bias", True, "lm_head.bias"),
        ("n_layers", "three", "x.json: "),
        ("d_model", 65, "n_heads"),
    ],
)
def test_what_ours_cannot_say_is_named(path, value, named):
    from_core_config(GIVEN, "x.json")
    with pytest.raises(UserError) as error:
        from_core_config(_with(path, value), "x.json")
    assert named in str(error.value) and str(error.value).startswith("x.json: ")
    assert "\n" not in str(error.value)


def test_layers_that_differ_are_refused():
    content = copy.deepcopy(GIVEN)
    other = copy.deepcopy(content["model"]["block"])
    other["sequence_mixer"]["rope"]["theta"] = 10_000
    content["model"]["block_overrides"] = {"1": other}
    with pytest.raises(UserError, match="layer 1 has another rope_theta than layer 0"):
        from_core_config(content, "x.json")


def test_older_spelling_of_attention():
    content = copy.deepcopy(GIVEN)
    content["model"]["block"]["attention"] = content["model"]["block"].pop("sequence_mixer")
    assert from_core_config(content, "x")[0] == from_core_config(GIVEN, "x")[0]


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"parallel_residual": True}, "parallel_residual"),
        ({"mlp": "gelu"}, "mlp = 'gelu'"),
        ({"position": "alibi"}, "position = 'alibi'"),
        ({"rope_theta": 1.5}, "rope_theta"),
        (
            {
                "rope_scaling": "yarn",
                "rope_factor": 8.0,
                "rope_original_context": 64,
                "rope_attention_factor": 1.5,
            },
            "rope_attention_factor = 1.5",
        ),
    ],
)
def test_what_olmo_core_cannot_say_is_refused(fields, named):
    with pytest.raises(UserError, match="OLMo-core cannot compute this model") as error:
        to_core_config(dataclasses.replace(OLMO2, **fields), "float32")
    assert named in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"window_pattern": (8, 8, 0)},
        {"rope_scaling": "linear", "rope_factor": 4.0},
        {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_context": 16},
        {"norm": "layer", "bias": True, "tie_embeddings": True},
        {"norm": "layer_nonparametric", "qk_norm": False, "clip_qkv": 8.0},
        {"head_dim": 32, "n_kv_heads": 2, "rope_fraction": 0.5, "norm_place": "pre"},
        {"embedding_init_std": 0.5},
    ],
)
def test_config_round_trip(fields):
    config = dataclasses.replace(OLMO2, n_kv_heads=4, context_length=4096)
    config = dataclasses.replace(config, vocab_size=256, **fields)
    assert from_core_config({"model": to_core_config(config, "float32")}, "x")[0] == config


def test_wrong_folders_are_named(checkpoints, tmp_path):
    folder = tmp_path / "in"
    weights = folder / "model_and_optim"

    def refused(message):
        with pytest.raises(UserError, match=message) as error:
            convert(folder, tmp_path / "out", "olmo_core")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
        shutil.rmtree(folder)
        shutil.copytree(checkpoints / "tied", folder)

    shutil.copytree(checkpoints / "tied", folder)
    (weights / "__0_1.distcp").unlink()
    refused(r"__0_1\.distcp: is missing, and \S+ lies in it")
    os.truncate(weights / "__0_1.distcp", 3000)
    refused(r"__0_1\.distcp: \S+: is cut short")
    (weights / ".metadata").unlink()
    refused(r"\.metadata: cannot be read")

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (weights / ".metadata").write_bytes(pickle.dumps(Bomb()))
    refused(r"\.metadata: its pickle names posix\.system")
    assert not (tmp_path / "ran").exists()
    content = json.loads((folder / "config.json").read_text())
    content["model"]["d_model"] = 32
    (folder / "config.json").write_text(json.dumps(content))
    refused(r"embeddings\.weight has shape \(64, 16\), its config says \(64, 32\)")
    content["model"].update(d_model=16, n_layers=3)
    (folder / "config.json").write_text(json.dumps(content))
    refused("missing")
    content["model"].update(n_layers=1)
    (folder / "config.json").write_text(json.dumps(content))
    refused(r"unexpected \['blocks\.1")
