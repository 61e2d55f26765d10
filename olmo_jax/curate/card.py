"""The data card: what a built data set is made of, for people."""

from pathlib import Path
from typing import Any

import yaml

from olmo_jax.files import write_file
from olmo_jax.numerals import size_text


def write_card(facts: dict[str, Any], path: Path) -> None:
    """Writes Markdown from the facts that `build` gathers (card.json has them as they are)."""
    tokens = facts["tokens"]
    lines = [
        "# Data card",
        "",
        f"{tokens['tokens']:,} tokens ({tokens['dtype']}) of {tokens['documents']:,} documents in "
        f"{len(tokens['files'])} files; fingerprint `{tokens['fingerprint']}`, of which that of a "
        "training run on them is made.",
        "",
        "## Sources",
        "",
        "| source | file | size | xxh3-128 (of samples, above 16 MB) |",
        "|---|---|---:|---|",
    ]
    for name, source in facts["sources"].items():
        for file, size, digest in source["files"]:
            lines.append(f"| {name} | `{file}` | {size_text(size)} | `{digest}` |")
    lines += ["", "## Documents", ""]
    for step in facts["steps"]:
        if step["step"] == "tag":
            lines.append(f"- tagged by {', '.join(step['taggers'])}")
        elif step["step"] == "dedupe":
            lines.append(
                f"- `{step['name']}` marked {step['duplicates']:,} of {step['units']:,} "
                "as seen before"
            )
        else:
            sets = ", ".join(f"`{name}`" for name in step["sets"])
            lines.append(f"- looked through for n-grams of the evaluation sets {sets}")
    for name, counts in facts["mix"].items():
        left = counts["documents"]
        lines += ["", f"### {name}", "", "| | documents | left |", "|---|---:|---:|"]
        for what, count in counts.items():
            if what in ("documents", "kept", "written"):
                lines.append(f"| {what} | {count:,} | |")
            else:
                left -= count
                text = what.replace("|", "\\|")
                lines.append(f"| {text} | -{count:,} | {left:,} |")
    lines += ["", "## Recipe", "", "```yaml", yaml.safe_dump(facts["recipe"], sort_keys=False)]
    lines += ["```", "", "## Versions", ""]
    lines += [f"- {name} {number}" for name, number in facts["versions"].items()]
    write_file(path, "\n".join(lines) + "\n")
