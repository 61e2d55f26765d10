"""The fused attention that the device picks, values and gradients, against the plain form."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, B, check, check_parts, documents

from olmo_jax.ops import attention_gpu
from olmo_jax.ops.attention_form import form_of
from olmo_jax.ops.attention_mask import AttentionMask
from olmo_jax.ops.kernels import pick_kernels

pytestmark = pytest.mark.device
# Of the largest value; bfloat16 has 8 bits, and probabilities are rounded to them before the second
# product. A wrong mask is wrong by about 1.
TOLERANCE = 2e-2


@pytest.fixture(scope="module")
def form(device):
    kernels = pick_kernels(device.platform, device.device_kind)
    assert kernels.attention in ("splash", "cudnn", "cudnn_unpacked"), kernels
    return form_of(kernels)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(form, case):
    check(form, *CASES[case](), jnp.bfloat16, TOLERANCE)


def test_more_documents_than_one_call_takes(form):
    ids = documents(2048, 40)
    assert len(np.unique(ids[0])) + len(np.unique(ids[1])) > 2 * B * attention_gpu._slots(B, 2048)
    check(form, 2048, 2048, AttentionMask(30, ids), jnp.bfloat16, TOLERANCE)


def test_a_long_row_with_a_window(form):
    check(form, 4096, 4096, AttentionMask(1024, documents(4096, 3)), jnp.bfloat16, TOLERANCE)


def test_a_rings_parts(form):
    check_parts(form, jnp.bfloat16, TOLERANCE)
