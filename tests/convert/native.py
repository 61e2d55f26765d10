"""The tiny checkpoints of the original programs (made by tests/oracles/make_*.py)."""

import hashlib
import tarfile
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"


def unpacked(name: str, into: Path) -> Path:
    """The folder of checkpoints in an archive, one folder for each variant."""
    with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
        archive.extractall(into, filter="data")
    return into / name


def variants(name: str) -> list[str]:
    """The variants in an archive."""
    with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
        return sorted({m.name.split("/")[1] for m in archive.getmembers() if "/" in m.name})


def assert_same_logits(model, folder: Path):
    """To 1e-5 of the largest, in float32."""
    saved = np.load(folder / "logits.npz")
    got = np.asarray(model(saved["tokens"]))
    worst = np.abs(got - saved["logits"]).max() / np.abs(saved["logits"]).max()
    assert worst < 1e-5, worst


def sha256(*paths: Path) -> str:
    """Of several files' contents together."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
