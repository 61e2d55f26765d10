"""Checkpoints that lie elsewhere: a hub-shaped and a plain web server on loopback."""

import os
import subprocess
import sys
from pathlib import Path

import fsspec  # noqa: F401 (its registry)
import pytest
from hf_models import OLMO2, perturbed
from hub_server import serve
from test_convert_hf import save

from olmo_jax import storage
from olmo_jax.convert.export import convert
from olmo_jax.convert.safetensors_io import SafetensorsFolder
from olmo_jax.errors import UserError

NAME, REVISION = "someone/A-model.1", "stage1-step7"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A sharded transformers folder, with a duplicate of its weights in PyTorch's format."""
    place = tmp_path_factory.mktemp("remote")
    convert(save(perturbed(OLMO2), place / "run"), place / "hf", max_shard_bytes=200_000)
    (place / "hf" / "pytorch_model.bin").write_bytes(b"a duplicate that nobody needs")
    (place / "hf" / "training_log.txt").write_text("neither is this")
    return place / "hf"


def run_convert(source: str, target: Path, endpoint: str, *options: str):
    variables = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(target.parent / "hub"),
        "XDG_CACHE_HOME": str(target.parent / "cache"),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "olmo_jax.cli", "convert", source, str(target), *options]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)


def same_tensors(a: Path, b: Path) -> bool:
    a_files, b_files = SafetensorsFolder(a), SafetensorsFolder(b)
    return a_files.names() == b_files.names() and all(
        a_files.read(name).tobytes() == b_files.read(name).tobytes() for name in a_files.names()
    )


def test_a_hub_id_is_fetched_once_and_only_what_is_needed(folder, tmp_path):
    with serve(folder, NAME, REVISION) as (endpoint, sent):
        done = run_convert(NAME, tmp_path / "hf", endpoint, f"--revision={REVISION}", "--verify")
        assert done.returncode == 0, done.stderr
        shards = {p.name for p in folder.glob("model-*.safetensors")}
        wanted = {"config.json", "generation_config.json", "model.safetensors.index.json"} | shards
        assert set(sent) == wanted and len(shards) > 1
        assert same_tensors(tmp_path / "hf", folder)
        sent.clear()
        again = run_convert(NAME, tmp_path / "again", endpoint, f"--revision={REVISION}")
        assert again.returncode == 0 and sent == []


def test_what_the_hub_does_not_have_is_one_line(folder, tmp_path):
    with serve(folder, NAME, REVISION) as (endpoint, _):
        for source, revision in (("someone/other", REVISION), (NAME, "no-such-branch")):
            done = run_convert(source, tmp_path / "hf", endpoint, f"--revision={revision}")
            assert done.returncode == 2
            assert f"{source} at {revision} could not be fetched from the hub" in done.stderr
            assert "Traceback" not in done.stderr and not (tmp_path / "hf").exists()


def test_a_plain_web_server_is_read(folder, tmp_path):
    with serve(folder, NAME, REVISION) as (endpoint, sent):
        url = f"{endpoint}/{NAME}/resolve/{REVISION}"
        done = run_convert(url, tmp_path / "hf", endpoint)
        assert done.returncode == 0, done.stderr
        assert same_tensors(tmp_path / "hf", folder)
        assert not {"pytorch_model.bin", "training_log.txt"} & set(sent)
        # The same name and size, and not the same file.
        shard = next(folder.glob("model-*.safetensors"))
        content = shard.read_bytes()
        try:
            shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            os.utime(shard, (2e9, 2e9))
            assert run_convert(url, tmp_path / "new", endpoint).returncode == 0
            assert same_tensors(tmp_path / "new", folder)
        finally:
            shard.write_bytes(content)
        missing = run_convert(f"{endpoint}/nothing", tmp_path / "no", endpoint)
        assert missing.returncode == 2 and "holds no model" in missing.stderr


def test_an_olmo_core_folder_on_the_web_is_read(folder, tmp_path):
    """As the original publishes them; .metadata tells which files there are."""
    convert(folder, tmp_path / "core", "olmo_core", max_shard_bytes=200_000)
    with serve(tmp_path / "core", NAME, REVISION) as (endpoint, sent):
        url = f"{endpoint}/{NAME}/resolve/{REVISION}"
        done = run_convert(url, tmp_path / "hf", endpoint)
        assert done.returncode == 0, done.stderr
    assert same_tensors(tmp_path / "hf", folder)
    assert len([name for name in sent if name.endswith(".distcp")]) > 1


@pytest.mark.parametrize(("protocol", "library"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_bucket_without_its_library_names_the_extra(tmp_path, monkeypatch, protocol, library):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(
        sys.modules["fsspec.registry"]._registry, protocol, raising=False
    )  # imported before
    storage._file_system.cache_clear()
    with pytest.raises(UserError, match=rf"^{protocol}://b/m: install olmo-jax\[remote\] to read"):
        convert(f"{protocol}://b/m", tmp_path / "hf")
