"""Every test runs on CPU; those that need several devices start a process of their own."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Half of the suite's time was LLVM's, optimising tiny programs that run once.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
