"""These tests compile for TPUs and GPUs that are not there, in an environment of their own: see
`make test-aot`."""

import os

from olmo_jax.plan.targets import prepare_process

prepare_process()
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile at once
