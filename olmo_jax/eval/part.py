"""What a killed evaluation had found: OUT.part, from which the same command goes on."""

import json
from pathlib import Path
from typing import Any

from olmo_jax.files import write_bytes, write_error


class Part:
    """A line that says what the others are of, then a line of JSON for each finding.

    `found` has those of an earlier call, none where they are of something else; half a line, which
    a kill may leave, is cut off. Raises UserError for what cannot be written.
    """

    def __init__(self, out: Path, of: Any):
        self.path = out.with_name(f"{out.name}.part")
        head = json.dumps({"of": of}).encode() + b"\n"
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            content = self.path.read_bytes() if self.path.exists() else b""
            content = content[: content.rfind(b"\n") + 1]
            if not content.startswith(head):
                content = head
            write_bytes(self.path, content)
            self._file = open(self.path, "ab")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise write_error(self.path, error) from error
        self.found = [json.loads(line) for line in content[len(head) :].splitlines()]

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, finding: Any) -> None:
        try:
            self._file.write(json.dumps(finding).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise write_error(self.path, error) from error

    def remove(self) -> None:
        """For when OUT itself is written."""
        self.path.unlink(missing_ok=True)
