"""Writes the fixtures' checkpoints again with olmo_jax, for the original programs to load.

In this project's environment: python tests/oracles/write_ours.py OUT (then check_olmo.py OUT and
check_olmo_core.py OUT in theirs; each says how to make it).
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from olmo_jax.convert.export import convert
from tests.convert.native import FIXTURES, unpacked

for archive in sorted(FIXTURES.glob("*.tar.xz")):
    name = archive.name.removesuffix(".tar.xz")
    with tempfile.TemporaryDirectory() as temporary:
        for folder in sorted(unpacked(name, Path(temporary)).iterdir()):
            convert(folder, Path(sys.argv[1]) / name / folder.name, name)
            print(name, folder.name)
