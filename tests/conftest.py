"""Every test runs on CPU; those that need several devices start a process of their own."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Half of the suite's time was LLVM's, optimising tiny programs that run once.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Much of the rest was compiling what another test, process or run had compiled.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache/xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
