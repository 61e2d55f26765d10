"""Tests that run on a GPU or TPU; `make test-device` runs them where there is one.

    JAX_PLATFORMS= XLA_FLAGS= python -m pytest -m device tests/device

What the kernels compute is held to the plain form, and training, resuming and decoding to what the
same program does on the host's CPU. Elsewhere they are skipped.
"""

import jax
import pytest


def pytest_collection_modifyitems(items):
    mine = [item for item in items if item.get_closest_marker("device")]
    if mine and _device().platform == "cpu":
        for item in mine:
            item.add_marker(pytest.mark.skip("needs a GPU or TPU"))


def _device():
    return jax.devices()[0]


@pytest.fixture(scope="session")
def device():
    return _device()


@pytest.fixture(scope="session")
def cpu():
    return jax.devices("cpu")[0]
