"""What a training run is: `TrainConfig`, and `RunConfig`, every room's configuration in one."""

from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from olmo_jax.checkpoint.checkpointer import CheckpointConfig
from olmo_jax.data.config import DataConfig
from olmo_jax.errors import UserError, validation_faults
from olmo_jax.model.config import ModelConfig
from olmo_jax.parallel.mesh import MeshConfig
from olmo_jax.train.optimizer import OptimizerConfig
from olmo_jax.train.schedules import ScheduleConfig


@dataclass(
    frozen=True,
    kw_only=True,
    config=ConfigDict(extra="forbid", use_attribute_docstrings=True),
)
class TrainConfig:
    """How long to train, and what to do on the way."""

    run_dir: str = "runs/run"
    """Folder of the run: configuration, metrics, checkpoints, report. Training resumes from its
    newest checkpoint when there is one."""
    steps: int | None = None
    """Length of the plan in optimizer steps; give this or `tokens`. 0 only writes a checkpoint of
    the initial weights (a soup)."""
    tokens: int | None = None
    """Length of the plan in tokens, rounded up to a whole step; give this or `steps`."""
    stop_at: int | None = None
    """Stop (and save) after this step, before the plan's end; the schedule does not change."""
    seed: int = 0
    """Seed of the initial weights."""
    init_from: tuple[str, ...] = ()
    """Start from these weights instead of random ones: whatever `olmo-jax convert` reads (a run
    folder, a checkpoint in it, another program's folder, a hub id); of several the uniform mean is
    taken (a soup). A single run's optimizer state comes along, as in the published annealing, and
    so does AdamW's of an OLMo-core checkpoint (convert first for a fresh one); step, data and
    schedule begin anew (but see data_from_step)."""
    data_from_step: int = 0
    """The first step reads what this step of the data's order would (counted from 0), so that a
    model goes on with the data where its training stopped; the batch-size schedule is shifted with
    it, the learning-rate schedule is not."""
    micro_batch_size: int | None = None
    """Instances in one forward and backward pass, over all devices; None is the whole batch. The
    gradient is the same for any value that divides the batch: one global denominator."""
    z_loss: float = 0.0
    """Weight of log(Z)² beside the cross-entropy (OLMo 2 32B: 1e-5, the
    smaller ones effectively 1e-4); never part of the reported loss."""
    tokenizer: str | None = None
    """The tokenizer.json that made the token files; kept with the run and its checkpoints, and
    needed for bits per byte and samples."""
    heldout: tuple[str, ...] = ()
    """Token files (or globs) to evaluate on: loss, perplexity and bits per byte."""
    heldout_every: int | None = None
    """Steps between evaluations (held-out text, tasks, samples); None is only at the end."""
    evaluators: tuple[str, ...] = ()
    """Tasks and suites (`olmo-jax eval --list`) to run beside the held-out text, at the same steps;
    they need `tokenizer`."""
    evaluators_limit: int | None = None
    """Only the first so many questions of each task; None is all."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts that the model continues at every evaluation, for the report."""
    sample_tokens: int = 100
    """Tokens of each such continuation."""
    tensorboard: bool = True
    """Also write metrics for TensorBoard."""
    wandb: bool = False
    """Also send metrics to Weights & Biases (the `wandb` extra)."""
    nonfinite_steps: int = 5
    """Steps in a row with a loss or gradient that is not finite after which the run stops."""
    hang_minutes: float | None = 30.0
    """Minutes without a step after which the run ends and shows where each process was; compiling
    and evaluating are not counted. None: never."""
    deterministic: bool = False
    """On GPU, ask XLA for deterministic kernels, so that a resumed run is bit-identical."""
    xla_flags: tuple[str, ...] = ()
    """Compiler flags beside those that this program chooses for the backend (--dry_run shows them):
    "name=value" adds one, or changes one of ours; "-name" drops one of ours."""

    @model_validator(mode="after")
    def _check(self):
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(
                f"steps = {self.steps}, tokens = {self.tokens}: give exactly one of the two"
            )
        if self.steps is not None and self.steps < 0:
            raise ValueError(f"steps = {self.steps}: it must be at least 0")
        if self.data_from_step < 0:
            raise ValueError(f"data_from_step = {self.data_from_step}: it must be at least 0")
        counts = ("tokens", "stop_at", "micro_batch_size", "heldout_every", "sample_tokens")
        for name in (*counts, "evaluators_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: it must be at least 1")
        if self.hang_minutes is not None and self.hang_minutes <= 0:
            raise ValueError(f"hang_minutes = {self.hang_minutes}: it must be above 0")
        return self


@plain_dataclass(frozen=True)
class RunConfig:
    """Everything that `olmo-jax train` was told, by gin name in lower case."""

    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    data: DataConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    mesh: MeshConfig

    def as_json(self) -> dict:
        """{"Model": {field: value}, …}, every value, ready for json."""
        return {name.capitalize(): fields for name, fields in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Mapping[str, Any]]) -> "RunConfig":
        """The inverse of as_json. UserError, one line, when another version wrote other fields."""
        parts, faults = {}, []
        for part, config_class in get_type_hints(cls).items():
            name = part.capitalize()
            try:
                parts[part] = config_class(**values.get(name, {}))
            except ValidationError as error:
                faults += [f"{name}: {fault}" for fault in validation_faults(error)]
        known = {part.capitalize() for part in get_type_hints(cls)}
        faults += [f"{name}: unknown" for name in sorted(set(values) - known)]
        if faults:
            raise UserError(f"not a configuration of this version: {'; '.join(faults)}")
        return cls(**parts)
