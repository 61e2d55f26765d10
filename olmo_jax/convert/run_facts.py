"""What a run folder tells of the run that one of its checkpoints is of, for the model card.

Patient: what is missing, damaged, or of another run is left out. (Reading a run for its page is
report/'s, which knows no checkpoint.)
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo_jax.checkpoint import CheckpointReader, RunFolder
from olmo_jax.files import jsonl_lines


@dataclass(frozen=True)
class RunFacts:
    """A run up to one of its checkpoints."""

    name: str
    """The run folder's name, without the way to it: cards are shared. "" for a lone checkpoint."""
    metadata: Mapping[str, Any]
    """The checkpoint's own: step, tokens, fingerprint of the data, and the configuration."""
    data: Mapping[str, Any]
    """data.json; empty if the checkpoint was trained on other data."""
    environment: Mapping[str, Any]
    """environment.json, which the run's last start wrote."""
    heldout: Mapping[str, Any]
    """The newest row of metrics.jsonl with held-out figures, at the checkpoint's step or before."""


def run_facts(reader: CheckpointReader, step: int, metadata: Mapping[str, Any]) -> RunFacts | None:
    """The facts of a checkpoint with this metadata; None when no run of ours trained it (it is a
    conversion)."""
    if "Train" not in metadata["config"]:
        return None
    checkpoints = reader.folder.resolve()
    folder = RunFolder(checkpoints.parent)
    is_in_a_run = checkpoints == folder.checkpoints
    name = folder.path.name if is_in_a_run else ""
    # The files beside a fork's first checkpoint are of what it became, not of what it was.
    if not is_in_a_run or "forked_from" in metadata:
        return RunFacts(name, metadata, {}, {}, {})
    data = _json(folder.data_json)
    if data.get("fingerprint") != metadata.get("fingerprint"):
        data = {}
    heldout = _heldout(folder.path / "metrics.jsonl", step)
    return RunFacts(name, metadata, data, _json(folder.environment_json), heldout)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _heldout(path: Path, last_step: int) -> dict[str, Any]:
    newest: dict[str, Any] = {}
    try:
        for line in jsonl_lines(path):
            if b'"heldout/' not in line:  # of a long run, all but a few
                continue
            try:
                row = json.loads(line)
                if newest.get("step", -1) < row["step"] <= last_step:
                    newest = row
            except (ValueError, KeyError, TypeError):
                continue
    except OSError:
        pass
    return newest
