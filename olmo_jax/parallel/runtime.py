"""Settings of the process that must be made before jax is imported: allocator, dispatch, cache.

The command line calls `configure` first; whoever uses the package from Python may set the same
variables.
"""

import os
import platform
import sys
from pathlib import Path


def configure() -> None:
    """Makes the settings; leaves alone whatever the user has set in the environment.

    Starts the program again, once, where the allocator can only be told by its environment.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "olmo_jax" / "xla"
    for name, value in (
        # A second start finds what the first compiled: by default jax keeps nothing that compiled
        # in under a second.
        ("JAX_COMPILATION_CACHE_DIR", str(cache)),
        ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0"),
        ("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1"),
        # On CPU a step that is dispatched early only gets its temporaries early, beside those of
        # the step that still runs: up to twice the memory (8.0 against 4.1 GB at 85M parameters).
        ("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false"),
    ):
        os.environ.setdefault(name, value)
    _use_huge_pages()


def _use_huge_pages() -> None:
    """Has glibc's malloc ask for huge pages, and starts the program again with that.

    XLA:CPU allocates its temporaries at every execution and the kernel clears each page: at 85M
    parameters a sixth of the processor time went there. Huge pages: 4.64 against 5.21 s a step
    (the best of five each), at the same peak of memory. Keeping freed memory instead (mallopt, or
    MALLOC_TRIM_THRESHOLD_) was as fast but fragmented: 4 to 13 GB for the same step.
    """
    chosen = "GLIBC_TUNABLES" in os.environ or any(
        name.startswith("MALLOC_") for name in os.environ
    )
    if chosen or platform.libc_ver()[0] != "glibc" or not sys.orig_argv:
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
