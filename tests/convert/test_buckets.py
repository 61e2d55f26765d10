"""Checkpoints in buckets: read from real servers on loopback, and what is said when one fails."""

import jax
import numpy as np
import pytest

import olmo_jax
from olmo_jax.convert.export import convert
from olmo_jax.convert.load import load_sharded
from olmo_jax.convert.safetensors_io import SafetensorsFolder
from olmo_jax.errors import UserError
from olmo_jax.model.transformer import parameters
from tests.buckets import BUCKET, SERVERS, files, forget
from tests.convert.hf_models import OLMO2, perturbed
from tests.convert.test_convert_hf import save

FORMATS = ("hf", "olmo", "olmo_core", "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One model in every format, a folder each."""
    place = tmp_path_factory.mktemp("models")
    save(perturbed(OLMO2), place / "run")
    for to in FORMATS[:-1]:
        convert(place / "run", place / to, to=to, max_shard_bytes=200_000)
    return place


@pytest.fixture(scope="module", params=["s3", pytest.param("gs", marks=pytest.mark.slow)])
def bucket(request, folder):
    """A server with those folders: its protocol, and the variables that lead to it."""
    with SERVERS[request.param]() as variables:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            there = files(request.param)
            for name in FORMATS:
                there.put(
                    f"{folder}/{name}", f"{request.param}://{BUCKET}/models/{name}", recursive=True
                )
        yield request.param, variables


@pytest.fixture
def url(bucket, monkeypatch, tmp_path):
    protocol, variables = bucket
    for name, value in {**variables, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TENSORSTORE_GCS_HTTP_URL", raising=False)
    forget()
    yield f"{protocol}://{BUCKET}/models"
    forget()


def test_every_format_converts(url, folder, tmp_path):
    wanted = SafetensorsFolder(folder / "hf")
    for name in FORMATS:
        convert(f"{url}/{name}", tmp_path / name, verify=True)
        got = SafetensorsFolder(tmp_path / name)
        assert got.names() == wanted.names()
        for tensor in wanted.names():
            np.testing.assert_array_equal(got.read(tensor), wanted.read(tensor))


def test_load_and_init_from(url, folder):
    tokens = np.arange(8)[None]
    here = olmo_jax.load(folder / "hf")
    np.testing.assert_array_equal(olmo_jax.load(f"{url}/run")(tokens), here(tokens))
    sharding = jax.tree.map(
        lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), parameters(here)
    )
    read = load_sharded([f"{url}/olmo_core"], here.config, sharding)
    jax.tree.map(np.testing.assert_array_equal, read, parameters(here))


def refused(url, target) -> str:
    forget()
    with pytest.raises(UserError) as error:
        convert(url, target)
    assert not target.exists() and "\n" not in str(error.value)
    return str(error.value)


def test_faults_are_one_line_and_leave_nothing(url, bucket, tmp_path, monkeypatch):
    protocol, variables = bucket
    at = f"{url}/nothing"
    assert refused(at, tmp_path / "no") == f"{at}: holds no model"
    at = f"{protocol}://nobucket/hf"
    assert refused(at, tmp_path / "no").startswith(f"{at}: cannot be fetched: ")
    files(protocol).rm(f"{url}/olmo/model.pt")
    assert "model.pt" in refused(f"{url}/olmo", tmp_path / "no")
    if protocol == "s3":
        for name in variables.keys() - {"AWS_ENDPOINT_URL"}:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        message = refused(f"{url}/hf", tmp_path / "no")
        assert message == f"{url}/hf: cannot be fetched: Unable to locate credentials; set " + (
            "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


@pytest.mark.slow  # gcsfs tries for half a minute
def test_a_server_that_is_down_is_one_line(url, bucket, tmp_path, monkeypatch):
    for name in {"AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"} & bucket[1].keys():
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert "onnect" in refused(f"{url}/hf", tmp_path / "no")
