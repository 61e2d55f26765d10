"""DataConfig: everything that says which tokens the n-th training instance holds.

Only values and their cross-checks; files are opened by `dataset.open_dataset`.
"""

from typing import Literal, Self

from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass


@dataclass(
    frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True)
)
class DataConfig:
    """Token files, how they are cut into instances, in which order, how many a step."""

    paths: tuple[str, ...] = ()
    """Token files (headerless .npy) or globs, in this order; the matches of a glob are sorted."""

    sources: dict[str, tuple[str, ...]] | None = None
    """A mixture instead of `paths`: for each source's name, its token files or globs."""

    weights: dict[str, float] | None = None
    """Share of the instances that each source gives; any positive numbers, divided by their sum."""

    sequence_length: int = 4096
    """T, tokens in an instance."""

    dtype: Literal["uint8", "uint16", "uint32", "uint64"] | None = None
    """Type of the token files; None takes the smallest that holds vocab_size - 1, as OLMo does."""

    eos_token_id: int | None = None
    """Token that ends a document; None finds documents through the .csv.gz beside each file."""

    instances: Literal["fixed", "packed"] = "fixed"
    """fixed: each file cut every T tokens, its tail dropped; packed: whole documents, best fit."""

    max_target_sequence_length: int | None = None
    """Fixed instances only: cut files to multiples of this first (OLMo 2 32B: 8192 at T 4096)."""

    group_size: int = 1
    """Packed instances only: how many consecutive files are packed together."""

    document_masking: bool = False
    """Attention stays within a document and positions restart at each one."""

    repetition_filter: bool = False
    """Mask the loss of an instance where 1 to 13 tokens repeat 32 times or more (OLMo 2)."""

    order: Literal["permute", "olmo", "sequential"] = "permute"
    """permute: keyed permutation in O(1) memory; olmo: the original's PCG64 shuffle."""

    seed: int = 0
    """Key of the order."""

    first_epoch: Literal[0, 1] = 1
    """What `olmo` calls the first epoch: 0 in the OLMo repository (OLMo 1), 1 in OLMo-core."""

    global_indices: tuple[str, ...] = ()
    """Order olmo only: the original's own `global_indices.npy` (raw uint32), a file for each epoch,
    in place of the seed's shuffle."""

    batch_size: int = 8
    """Instances in a step, over all processes."""

    batch_size_schedule: tuple[tuple[int, int], ...] = ()
    """(from_step, batch_size) pairs that replace `batch_size` from that step on."""

    workers: int = 0
    """Reader processes; 0 reads in threads, which suits all but the largest hosts' batches."""

    prefetch: int = 4
    """Batches read ahead (per worker process when there are any)."""

    index_dir: str | None = None
    """Folder for index files (packing, olmo order); None: ~/.cache/olmo_jax/data."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require(self.sequence_length >= 2, "sequence_length must be at least 2")
        _require(self.batch_size >= 1, "batch_size must be at least 1")
        _require(self.group_size >= 1, "group_size must be at least 1")
        _require(self.workers >= 0, "workers must be 0 or more")
        _require(self.prefetch >= 1, "prefetch must be at least 1")
        _require(self.seed >= 0, "seed must be 0 or more")
        _require(
            not (self.paths and self.sources),
            "give either paths (one set of files) or sources with weights (a mixture), not both",
        )
        _require(
            not self.global_indices or (self.order == "olmo" and not self.sources),
            "global_indices go with order olmo and paths",
        )
        self._check_sources()
        steps = [step for step, _ in self.batch_size_schedule]
        _require(
            steps == sorted(set(steps)) and all(s >= 0 for s in steps),
            f"batch_size_schedule must list steps of 0 or more in rising order, got {steps}",
        )
        _require(
            all(size >= 1 for _, size in self.batch_size_schedule),
            "every batch size in batch_size_schedule must be at least 1",
        )
        longest = self.max_target_sequence_length
        if longest is not None:
            _require(
                self.instances == "fixed", "max_target_sequence_length goes with fixed instances"
            )
            _require(
                longest > 0 and longest % self.sequence_length == 0,
                f"max_target_sequence_length {longest} must be a multiple of sequence_length "
                f"{self.sequence_length}",
            )
        return self

    def _check_sources(self) -> None:
        if self.sources is None:
            _require(self.weights is None, "weights go with sources; paths take none")
            return
        weights = self.weights or {}
        missing = sorted(set(self.sources) - set(weights))
        unknown = sorted(set(weights) - set(self.sources))
        _require(not missing, f"sources without a weight: {', '.join(missing)}")
        _require(not unknown, f"weights for unknown sources: {', '.join(unknown)}")
        bad = sorted(n for n, w in weights.items() if not 0 < w < float("inf"))
        _require(not bad, f"weights must be positive numbers: {', '.join(bad)}")
        empty = sorted(n for n, files in self.sources.items() if not files)
        _require(not empty, f"sources without files: {', '.join(empty)}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
