"""Real text that installs from package indexes, as documents: scenes of plays, manual pages, the
Debian handbook in all its languages; and as much text as is asked for, made of their lines.
"""

import gzip
import json
import random
import re
import runpy
import subprocess
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

PLAYS = Path(__file__).parents[1] / "launch" / "demo_text.py"
_MANUALS = Path("/usr/share/man")
_FILE_BYTES = 10_000_000


class _Text(HTMLParser):
    """The text of a page, a line for each block."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag in ("p", "div", "li", "h1", "h2", "h3", "pre", "dt", "dd", "tr", "br"):
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)


def html_text(page: str) -> str:
    body = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", "", page)
    parser = _Text()
    parser.feed(body)
    return re.sub(r"\s*\n\s*", "\n", "".join(parser.pieces)).strip()


def plays() -> Iterator[dict]:
    for name, play in runpy.run_path(str(PLAYS))["read_plays"]().items():
        for i, text in enumerate(re.split(r"^(?=### )", play, flags=re.MULTILINE)):
            url = f"https://plays.example.org/{name}/{i}"
            yield {"id": f"{name}-{i}", "text": text, "source": "plays", "metadata": {"url": url}}


def manual_pages(most: int = 2000) -> Iterator[dict]:
    """Pages of this machine as groff shows them, or as they are written where there is none."""
    for path in sorted(_MANUALS.glob("man[1-8]/*.gz"))[:most]:
        text = gzip.decompress(path.read_bytes()).decode(errors="replace")
        url = f"https://man.example.org/{path.parent.name}/{path.stem}"
        yield {"id": path.stem, "text": text, "source": "manuals", "metadata": {"url": url}}


def handbook() -> Iterator[dict]:
    """The Debian handbook's pages, out of its package (apt-get download; nothing is installed)."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", "debian-handbook"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        [package] = Path(folder).glob("debian-handbook_*.deb")
        subprocess.run(["dpkg", "-x", package, folder], check=True)
        for path in sorted(Path(folder).glob("usr/share/doc/debian-handbook/html/*/*.html")):
            name = f"{path.parent.name}/{path.stem}"
            yield {
                "id": f"handbook/{name}",
                "text": html_text(path.read_text(errors="replace")),
                "source": "handbook",
                "metadata": {"url": f"https://debian-handbook.example.org/{name}.html"},
            }


def write(folder: Path, files: int = 8) -> None:
    """All of it, shuffled over `files` files in folder/documents."""
    rows = [*plays(), *manual_pages(), *handbook()]
    random.Random(0).shuffle(rows)
    (folder / "documents").mkdir(parents=True)
    for k in range(files):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows[k::files])
        (folder / "documents" / f"{k:02}.jsonl").write_text("".join(lines))


def grow(folder: Path, corpus: Path, megabytes: int) -> None:
    """So many MB of documents in folder/documents, in files of 10 MB: each has the number of lines
    of a real document, drawn from all its source's lines, of which a half are numbered anew, so
    that new text goes on coming as it does in a corpus of that size."""
    rows = [json.loads(line) for p in sorted(corpus.glob("documents/*")) for line in p.open()]
    lines: dict[str, list[str]] = {}
    for row in rows:
        lines.setdefault(row["source"], []).extend(row["text"].split("\n"))
    rng = random.Random(0)
    (folder / "documents").mkdir(parents=True)
    left = megabytes * 1_000_000
    for k in range(-(-left // _FILE_BYTES)):
        with (folder / "documents" / f"{k:04}.jsonl").open("w") as file:
            size = 0
            while size < min(_FILE_BYTES, left):
                row = rng.choice(rows)
                drawn = rng.choices(lines[row["source"]], k=row["text"].count("\n") + 1)
                text = "\n".join(x if rng.random() < 0.5 else f"{x} {rng.random()}" for x in drawn)
                new = {**row, "id": f"{k}-{size}", "text": text}
                size += file.write(json.dumps(new) + "\n")
            left -= size
