"""Learning-rate schedules: one float64 function of the step, computed on the host.

Not for use inside jit: in float32 the values miss by about 3e-7 relative, and token counts overflow
int32. The formulas are those of OLMo (olmo/optim.py) and OLMo-core (optim/scheduler.py).
"""

import math
from itertools import accumulate
from typing import Literal

from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass

from olmo_jax.errors import UserError

SimpleKind = Literal[
    "cosine",
    "linear",
    "inverse_sqrt",
    "wsd",
    "constant",
    "constant_with_warmup",
    "cosine_linear_envelope",
    "power",
    "half_cosine",
]
Kind = Literal[SimpleKind, "sequential"]


@dataclass(
    frozen=True,
    kw_only=True,
    config=ConfigDict(extra="forbid", use_attribute_docstrings=True),
)
class ScheduleConfig:
    """How the learning rate goes from its peak (`Optimizer.learning_rate`) to its end."""

    kind: Kind = "cosine"
    """Shape after the warm-up. "wsd" is warm-up, stable, linear decay; "power" falls as
    (current / warmup)^exponent, then linearly; "half_cosine" is the second half of a cosine whose
    peak is the learning rate, so that its own highest value is midway between peak and end;
    "sequential" runs the schedules of `stage_kinds` one after the other."""
    units: Literal["steps", "tokens"] = "steps"
    """What `warmup`, `length`, `decay` and `stage_lengths` count."""
    warmup: int = 0
    """Length of the linear warm-up, in `units`; 0 is none."""
    warmup_fraction: float | None = None
    """The warm-up as a share of the length, in place of `warmup`."""
    warmup_start_fraction: float = 0.0
    """Where the warm-up starts, as a share of the value that it ends at: 0 as OLMo-core and OLMo
    2's published files; the OLMo repository (OLMo 1) starts at 0.1 where nothing is given."""
    length: int | None = None
    """Where the schedule ends (the originals' t_max), in `units`; None is the whole run. The rate
    keeps its last value beyond it."""
    final_fraction: float = 0.1
    """The last value as a share of the peak (the originals' alpha_f, whose default this is). WSD
    and power end at 0 in OLMo-core; inverse_sqrt, which has no end, goes towards it (OLMo: 0)."""
    floor_fraction: float = 0.0
    """cosine: the rate, once warmed up, is never below this share of the peak (GPT-NeoX's
    min_lr)."""
    decay: int | None = None
    """wsd and power: length of the linear decay at the end, in `units`."""
    decay_fraction: float | None = None
    """wsd and power: that length as a share of the whole; where neither is given it is 0.1."""
    exponent: float = -0.51
    """power: the exponent, negative (OLMo-core's default)."""
    stage_kinds: tuple[SimpleKind, ...] = ()
    """sequential: the kind of each stage. A stage's peak is the value at which the one before
    ended, and its fractions are shares of that."""
    stage_lengths: tuple[int, ...] = ()
    """sequential: how long each stage but the last runs, in `units`; the last runs to the end."""
    stage_warmups: tuple[int, ...] = ()
    """sequential: the warm-up of each stage; () is none."""
    stage_final_fractions: tuple[float, ...] = ()
    """sequential: the final_fraction of each stage; () is `final_fraction` for all."""
    stage_decays: tuple[int, ...] = ()
    """sequential: the decay of each stage (0 where its kind has none); () is a tenth for wsd and
    power."""

    @model_validator(mode="after")
    def _check(self):
        has_warmup = self.warmup > 0 or bool(self.warmup_fraction)
        if self.warmup < 0 or (self.length is not None and self.length < 1):
            raise ValueError(
                f"warmup = {self.warmup}, length = {self.length}: "
                "warmup must be at least 0 and length at least 1"
            )
        if self.warmup and self.warmup_fraction is not None:
            raise ValueError("warmup and warmup_fraction are both given: give one of them")
        if self.decay is not None and self.decay_fraction is not None:
            raise ValueError("decay and decay_fraction are both given: give one of them")
        for name in (
            "warmup_fraction",
            "warmup_start_fraction",
            "final_fraction",
            "floor_fraction",
            "decay_fraction",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} = {value}: it must be between 0 and 1")
        if self.kind in ("inverse_sqrt", "power") and not has_warmup:
            raise ValueError(f'kind = "{self.kind}" needs a warm-up, from where it falls')
        if self.kind in ("constant", "sequential") and has_warmup:
            use = "constant_with_warmup" if self.kind == "constant" else "stage_warmups"
            raise ValueError(f'kind = "{self.kind}" has no warm-up of its own: use {use}')
        if self.kind not in ("wsd", "power") and (self.decay or self.decay_fraction):
            raise ValueError(f'kind = "{self.kind}" has no decay at its end: use "wsd" or "power"')
        if self.floor_fraction and self.kind != "cosine":
            raise ValueError(f'floor_fraction goes with kind = "cosine", not "{self.kind}"')
        if self.decay is not None and self.decay < 0:
            raise ValueError(f"decay = {self.decay}: it must be at least 0")
        if self.exponent >= 0:
            raise ValueError(f"exponent = {self.exponent}: it must be negative")
        self._check_stages()
        return self

    def _check_stages(self):
        n = len(self.stage_kinds)
        if self.kind != "sequential":
            if n:
                raise ValueError('stage_kinds is given: that needs kind = "sequential"')
            return
        if n < 2 or len(self.stage_lengths) != n - 1:
            raise ValueError(
                f"sequential has {n} stage_kinds and {len(self.stage_lengths)} stage_lengths: give "
                "two kinds or more, and one length fewer than kinds"
            )
        if any(length < 1 for length in self.stage_lengths):
            raise ValueError(f"stage_lengths = {self.stage_lengths}: each must be at least 1")
        for name in ("stage_warmups", "stage_final_fractions", "stage_decays"):
            if len(getattr(self, name)) not in (0, n):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {n} stages")
        for stage in range(n):
            self.stage(stage)  # its own checks

    def stage(self, index: int) -> "ScheduleConfig":
        """The schedule of one stage of a sequential one."""
        kind = self.stage_kinds[index]
        decays = self.stage_decays if kind in ("wsd", "power") else ()
        return ScheduleConfig(
            kind=kind,
            units=self.units,
            warmup=self.stage_warmups[index] if self.stage_warmups else 0,
            warmup_start_fraction=self.warmup_start_fraction,
            final_fraction=(
                self.stage_final_fractions[index]
                if self.stage_final_fractions
                else self.final_fraction
            ),
            decay=decays[index] if decays else None,
            exponent=self.exponent,
        )


def learning_rate(
    config: ScheduleConfig,
    peak: float,
    step: int,
    tokens: int,
    total_steps: int,
    total_tokens: int,
) -> float:
    """The learning rate of one training step.

    Args:
        config: the schedule.
        peak: the highest learning rate (half_cosine: that of the whole cosine).
        step: number of this step counted from 1, as the originals count (the first step has 1).
        tokens: tokens seen when this step is done, its own batch included, masked ones too.
        total_steps: steps of the whole run, used where `config.length` is None.
        total_tokens: tokens of the whole run, used where `config.length` is None.

    Raises:
        UserError: warm-up and decay do not fit into the length; no total is known that is needed.
    """
    current, total = (step, total_steps) if config.units == "steps" else (tokens, total_tokens)
    return _value(config, float(peak), current, config.length or total)


def check(config: ScheduleConfig, peak: float, total_steps: int, total_tokens: int) -> None:
    """Raises what `learning_rate` would raise at any time of the run."""
    total = total_steps if config.units == "steps" else total_tokens
    for after in (0, *accumulate(config.stage_lengths), total - 1):
        if 0 <= after < total:
            _value(config, peak, after + 1, config.length or total)


def _value(config: ScheduleConfig, peak: float, current: int, length: int) -> float:
    """`config` at `current` out of `length`, both in the schedule's units."""
    if config.kind == "sequential":
        return _sequential(config, peak, current, length)
    if config.kind == "constant":
        return peak
    warmup, decay = _extents(config, length)
    end = peak * config.final_fraction

    if current < warmup:
        top = end + (peak - end) / 2 if config.kind == "half_cosine" else peak
        start = top * config.warmup_start_fraction
        return start + (top - start) * current / warmup

    # From here on `done` of `span` is what has passed since the warm-up.
    done, span = current - warmup, length - warmup
    match config.kind:
        case "constant_with_warmup":
            return peak
        case "inverse_sqrt":
            return end + (peak - end) * math.sqrt(warmup / current)
        case "wsd":
            return _decayed(peak, end, length - current, decay)
        case "power":
            tail = peak * ((length - decay) / warmup) ** config.exponent
            if decay and tail < end:
                raise UserError(
                    f"Schedule: power has fallen to {tail:g} when its decay begins, below its end "
                    f"{end:g}: lower final_fraction (OLMo-core ends at 0)"
                )
            if current >= length - decay:
                return _decayed(tail, end, length - current, decay)
            return peak * (current / warmup) ** config.exponent
    if current >= length:
        return max(end, peak * config.floor_fraction)
    match config.kind:
        case "cosine":
            value = end + (peak - end) * (1 + math.cos(math.pi * done / span)) / 2
            return max(value, peak * config.floor_fraction)
        case "half_cosine":
            return end + (peak - end) * (1 + math.cos(math.pi * (done + span) / (span * 2))) / 2
        case "linear":
            return peak - (peak - end) * (done / span)
        case "cosine_linear_envelope":
            cosine = (peak - end) * (1 + math.cos(math.pi * done / span)) / 2
            return end + (1 - done / span) * cosine
    raise AssertionError(config.kind)


def _extents(config: ScheduleConfig, length: int) -> tuple[int, int]:
    """Warm-up and decay in the schedule's units, checked against the length."""
    warmup = config.warmup
    if config.warmup_fraction is not None:
        warmup = round(length * config.warmup_fraction)
    if config.kind in ("inverse_sqrt", "power") and not warmup:
        raise UserError(
            f"Schedule: {config.kind} falls from a warm-up, and warmup_fraction = "
            f"{config.warmup_fraction} of {length:,} {config.units} is none: lengthen it"
        )
    decay = 0
    if config.kind in ("wsd", "power"):
        fraction = 0.1 if config.decay_fraction is None else config.decay_fraction
        decay = round(length * fraction) if config.decay is None else config.decay
    endless = config.kind in ("constant_with_warmup", "inverse_sqrt")
    if not endless and warmup + decay > length:
        raise UserError(
            f"Schedule: warm-up {warmup:,} and decay {decay:,} do not fit into the length "
            f"{length:,} ({config.units}): shorten them or lengthen the run"
        )
    return warmup, decay


def _decayed(top: float, end: float, left: int, decay: int) -> float:
    """Linear from `top` when `left` is `decay` or more to `end` when nothing is left."""
    if left <= 0:  # OLMo-core goes on falling here, below 0 in the end
        return end
    return end + (top - end) * min(left, decay) / decay if decay else top


def _sequential(config: ScheduleConfig, peak: float, current: int, length: int) -> float:
    """OLMo-core's SequentialScheduler: each stage's peak is where the last one ended."""
    for index, stage_length in enumerate(config.stage_lengths):
        stage = config.stage(index)
        if current <= stage_length:
            return _value(stage, peak, current, min(length, stage_length))
        peak = _value(stage, peak, stage_length, stage_length)
        current, length = current - stage_length, length - stage_length
    return _value(config.stage(len(config.stage_kinds) - 1), peak, current, max(length, 1))
