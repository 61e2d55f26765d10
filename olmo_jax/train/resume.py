"""What may change between a checkpoint and the run that goes on from it, and forking."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olmo_jax.checkpoint import CheckpointReader, RunFolder
from olmo_jax.checkpoint.checksums import write_manifest
from olmo_jax.errors import UserError

# Bindings that change neither the numbers nor the data of the steps to come.
_MAY_CHANGE = {
    "Mesh": "all",
    "Checkpoint": "all",
    "Model": ("remat",),
    "Data": ("workers", "prefetch", "index_dir", "paths", "sources"),
    "Train": (
        "run_dir",
        "stop_at",
        "micro_batch_size",
        "heldout",
        "heldout_every",
        "sample_prompts",
        "sample_tokens",
        "tensorboard",
        "wandb",
        "nonfinite_steps",
        "tokenizer",
    ),
}


def differing_bindings(now: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """The bindings that may not change and did, as "Name.field = new (was old)"."""
    now, saved = json.loads(json.dumps(now)), json.loads(json.dumps(saved))
    out = []
    for component in sorted(set(now) | set(saved)):
        may_change = _MAY_CHANGE.get(component, ())
        if may_change == "all":
            continue
        new, old = now.get(component, {}), saved.get(component, {})
        for field in sorted(set(new) | set(old)):
            if field not in may_change and new.get(field) != old.get(field):
                out.append(f"{component}.{field} = {new.get(field)!r} (was {old.get(field)!r})")
    return out


def refuse_changes(
    config: Mapping[str, Any], fingerprint: str, saved: Mapping[str, Any], run_dir: Path
) -> None:
    """Raises UserError when a run would go on with other data or another configuration.

    `saved` is the checkpoint's metadata. A forked checkpoint accepts any.
    """
    if saved.get("forked_from"):
        return
    advice = (
        f"give the same again, another Train.run_dir, or `olmo-jax fork {run_dir} NEW_RUN` to go "
        "on with the change on purpose"
    )
    differs = differing_bindings(config, saved["config"])
    if differs:
        raise UserError(
            f"the configuration is not that of the checkpoint in {run_dir}: "
            f"{'; '.join(differs)}; {advice}"
        )
    if fingerprint != saved["fingerprint"]:
        raise UserError(
            f"the data is not that of the checkpoint in {run_dir}: fingerprint {fingerprint}, was "
            f"{saved['fingerprint']}; {advice}"
        )


def fork(run_dir: Path | str, new_run_dir: Path | str, step: int | None = None) -> int:
    """Starts a new run folder from one checkpoint of another (the newest without a step).

    The next `olmo-jax train` there goes on from that step with whatever configuration it is given.
    Returns the step. Raises UserError for a missing or damaged checkpoint, or a folder in use.
    """
    old, new = RunFolder(run_dir), RunFolder(new_run_dir)
    reader = CheckpointReader(old.checkpoints)
    step = reader.latest() if step is None else step
    if step is None:
        raise UserError(f"{run_dir}: there is no complete checkpoint to fork from")
    metadata = reader.metadata(step)
    reader.verify(step)
    if new.path.exists() and any(new.path.iterdir()):
        raise UserError(f"{new_run_dir}: the folder is not empty; give a new one")
    new.open_for_writing()
    target = CheckpointReader(new.checkpoints).path(step)
    temporary = target.with_name(target.name + ".tmp")
    shutil.copytree(reader.path(step), temporary)
    metadata |= {"forked_from": {"run": str(old.path), "step": step}, "permanent": True}
    new.write_text(temporary / "metadata.json", json.dumps(metadata, indent=1))
    write_manifest(temporary)
    temporary.rename(target)
    return step
