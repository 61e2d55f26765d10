"""A run folder as a `Trace`: which steps it finished, what it recorded of them, its tokenizer.

Reading only; it imports no jax, so that a run of a pod is looked at on any laptop.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from olmo_jax import storage
from olmo_jax.data.config import DataConfig
from olmo_jax.data.dataset import open_dataset
from olmo_jax.data.tokenizer import load_tokenizer
from olmo_jax.data.trace import Trace, digest
from olmo_jax.errors import UserError
from olmo_jax.files import jsonl_lines

_STEP = re.compile(rb'\{"step": (\d+),')


class TracedRun:
    """The steps that a run has finished: all of them, or those before a checkpoint."""

    def __init__(
        self,
        run_dir: Path | str,
        before_checkpoint: int | None = None,
        data: DataConfig | None = None,
    ):
        """`data` is the run's own, with other paths, where its token files have moved.

        Raises UserError for a folder that is no run's, where the run has finished no step or has no
        such checkpoint, and for token files that are not there or not what they were.
        """
        self.folder = storage.location(run_dir)
        config = _read_json(self.folder / "config.json")
        try:
            data = data or DataConfig(**config["Data"])
            vocab_size, ahead = config["Model"]["vocab_size"], config["Train"]["data_from_step"]
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.folder / 'config.json'}: is not there, or not of a run of this version; "
                "give a run folder, the Train.run_dir of a run"
            ) from None
        steps = [step for step, _ in self._recorded()]
        if not steps:
            raise UserError(f"{run_dir}: has finished no step: it has no instances.jsonl")
        first, last = min(steps) - 1, max(steps)
        self._finished = last
        if before_checkpoint is not None:
            self._refuse_checkpoint(before_checkpoint)
            last = before_checkpoint
        elsewhere = "if they have moved, say where with --gin.Data.paths='(\"…/*.npy\",)'"
        try:
            dataset = open_dataset(data, vocab_size)
        except UserError as error:
            raise UserError(f"the token files of {run_dir}: {error}; {elsewhere}") from None
        was = _read_json(self.folder / "data.json").get("fingerprint")
        if was and was != dataset.fingerprint:
            raise UserError(
                f"the data is not what {run_dir} was trained on: fingerprint "
                f"{dataset.fingerprint}, was {was}; {elsewhere}"
            )
        self.trace = Trace(dataset, last, first, ahead)

    def check_step(self, step: int) -> None:
        """Raises UserError for a step that the run has not finished, or another run did."""
        trace = self.trace
        if step > trace.last:
            raise UserError(
                f"--step={step}: {self.folder} has finished steps {trace.first + 1} to "
                f"{self._finished}"
                + (f", {trace.last} before the checkpoint" * (trace.last < self._finished))
                + "; olmo-jax data inspect shows instances to come"
            )
        self.check_own(step)
        trace.batch_step(step)

    def check_own(self, step: int, option: str = "--step") -> None:
        """Raises UserError for a step of the run that this one was forked from."""
        if 0 < step <= self.trace.first:
            raise UserError(
                f"{option}={step}: {self.folder} begins at step {self.trace.first + 1}; the ones "
                f"before it are of {self.parent()}: ask there"
            )

    def parent(self) -> str:
        """The run that the steps up to `trace.first` are of."""
        metadata = _read_json(self.folder / f"checkpoints/step{self.trace.first}/metadata.json")
        return metadata.get("forked_from", {}).get("run", "the run before")

    def agrees(self, steps: Iterable[int]) -> dict[int, bool | None]:
        """For each step whether its instances and tokens are those that the run recorded when it
        was given them; None where it recorded none."""
        found: dict[int, bool | None] = dict.fromkeys(steps)
        for step, line in self._recorded():
            if step not in found or "tokens_xxh3" not in (recorded := json.loads(line)):
                continue
            batch = self.trace.batch(step, recorded.get("rows"))
            assert batch.instance_ids_B is not None
            same_ids = batch.instance_ids_B.tolist() == recorded["instance_ids"]
            found[step] = same_ids and digest(batch.tokens_BT) == recorded["tokens_xxh3"]
        return found

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the run keeps."""
        path = self.folder / "tokenizer.json"
        return load_tokenizer(str(path)) if storage.exists(path) else None

    def _recorded(self) -> Iterator[tuple[int, bytes]]:
        for line in jsonl_lines(self.folder / "instances.jsonl"):
            if (match := _STEP.match(line)) and line.rstrip().endswith(b"}"):
                yield int(match[1]), line

    def _refuse_checkpoint(self, step: int) -> None:
        names = storage.listing(self.folder / "checkpoints")
        found = [re.fullmatch(r"step(\d+)/manifest.json", name) for name in names]
        steps = sorted(int(match[1]) for match in found if match)
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise UserError(
                f"--before_checkpoint={step}: {self.folder} has checkpoints of steps {there}"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
