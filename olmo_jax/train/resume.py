"""What may change between a checkpoint and the run that goes on from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olmo_jax.data.config import DataConfig
from olmo_jax.data.steps import Steps
from olmo_jax.errors import UserError
from olmo_jax.train.config import RunConfig

# Bindings that change neither the numbers nor the data of the steps to come.
_MAY_CHANGE = {
    "Mesh": "all",
    "Checkpoint": "all",
    "Model": ("remat",),
    "Data": ("workers", "prefetch", "index_dir", "paths", "sources", "global_indices"),
    "Train": (
        "run_dir",
        "stop_at",
        "micro_batch_size",
        "heldout",
        "heldout_every",
        "evaluators",
        "evaluators_limit",
        "sample_prompts",
        "sample_tokens",
        "tensorboard",
        "wandb",
        "nonfinite_steps",
        "hang_minutes",
        "xla_flags",
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
    try:  # fields that an older version did not know have their defaults
        was = RunConfig.from_json(saved["config"]).as_json()
    except UserError as error:
        raise UserError(f"the checkpoint in {run_dir} has {error}; {advice}") from None
    differs = differing_bindings(config, was)
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


def refuse_gap(data: DataConfig, step: int, saved: Mapping[str, Any]) -> None:
    """Raises UserError when a fork's batch sizes would skip instances after `step`, or repeat them.

    `step` is counted in the data's order (with Train.data_from_step); `saved` is the checkpoint's
    metadata, whose n is where in that order it stands.
    """
    steps = Steps(data.batch_size, data.batch_size_schedule)
    if (n := steps.first_n(step)) == saved["n"]:
        return
    old = saved["config"]["Data"]
    before = [(at, size) for at, size in old["batch_size_schedule"] if at < step]
    raise UserError(
        f"the checkpoint's {step} steps consumed {saved['n']} instances, and would have consumed "
        f"{n} with these batch sizes: give Data.batch_size = {old['batch_size']} and "
        f"Data.batch_size_schedule = {(*before, (step, steps.batch_size(step)))}, so that the new "
        "size begins here"
    )
