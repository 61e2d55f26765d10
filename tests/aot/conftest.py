"""Tests that compile for TPUs and GPUs that are not there; `make test-aot` runs them.

How: `jax.experimental.topologies` gives abstract devices, of libtpu for a TPU and of a text that
describes the chip for a GPU (`plan/targets.py`). A mesh of them and shapes with shardings on it are
all that `jit(f).trace(…).lower(lowering_platforms=…).compile()` needs: it runs the real compiler,
and what comes out is the program that the machine would run. Nothing can be run, so what a kernel
computes is tested elsewhere (tests/ops/test_attention_kernels.py).

What it takes: libtpu (137 MB), and jax's CUDA plugin and PJRT (132 MB), without any of NVIDIA's
libraries; cuDNN's own workspace is then in no figure, as XLA asks cuDNN for it on the machine. They
live in an environment of their own (`.venv-aot`): beside them a plain `jax.devices()` prints the
errors of two plugins that find no device, and takes 0.2 to 0.8 s instead of 0.03.
"""

import os

from olmo_jax.plan.targets import prepare_process

prepare_process()
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile at once
