"""Finds, checks and reads the checkpoints of a run; never writes or deletes.

A checkpoint is a folder `step{N}`:

    manifest.json    size and xxh3 digest of every other file; written last
    metadata.json    step, whether permanent, names, shapes and dtypes of all arrays, and whatever
                     the training loop added (data position, fingerprint, configuration)
    tokenizer.json … small files that the run wants in each checkpoint
    params/          the weights, an Orbax tree (OCDBT)
    train_state/     the rest of the state, another, so that weights can be read alone

It is complete when it has its manifest. One without is half-written and passed over; one whose
files differ from the manifest is damaged and refused.
"""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.experimental import multihost_utils

from olmo_jax import storage
from olmo_jax.checkpoint.arrays import open_arrays, read_arrays
from olmo_jax.checkpoint.checksums import MANIFEST, first_damage
from olmo_jax.errors import UserError

log = logging.getLogger("olmo_jax.checkpoint")

METADATA = "metadata.json"
ITEMS = ("params", "train_state")
Name = tuple[str, ...]


def named_leaves(tree: Any) -> list[tuple[Name, Any]]:
    """The leaves of any pytree with the path of each, as strings, in the tree's own order."""
    return [
        (tuple(jax.tree_util.keystr((key,), simple=True) for key in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def item_trees(leaves: list[tuple[Name, Any]]) -> dict[str, dict]:
    """Sorts leaves into nested dicts, one per item on disk: `params` apart from all the rest.

    Plain dicts, because Orbax then needs to know nothing of optax's or our own tuples.
    """
    trees: dict[str, dict] = {}
    for name, leaf in leaves:
        path = name if name[0] == "params" else ("train_state", *name)
        node = trees
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return trees


class CheckpointReader:
    """The checkpoints in one folder (`RUN/checkpoints`).

    With several processes, all of them call the same methods: they divide the checking.
    """

    def __init__(self, folder: str | Path):
        self.folder = storage.location(folder)

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint, whether it is there or not."""
        return self.folder / f"step{step}"

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, rising."""
        return [step for step in self._all_steps() if (self.path(step) / MANIFEST).is_file()]

    def latest(self) -> int | None:
        """The newest complete checkpoint, None without one; warns of newer half-written ones."""
        complete = self.steps()
        newest = complete[-1] if complete else -1
        if jax.process_count() > 1:  # all must take the same one, whatever their disk cache shows
            newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
        for step in self._all_steps():
            if step > newest:
                instead = f"taking step {newest}" if newest >= 0 else "there is no older one"
                log.warning(
                    "passed over the half-written checkpoint %s (it has no %s): %s",
                    self.path(step),
                    MANIFEST,
                    instead,
                )
        return newest if newest >= 0 else None

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata saved with a step. Raises UserError when it is missing or damaged."""
        self._require(step)
        self._refuse_damage(step, (METADATA,))
        return json.loads((self.path(step) / METADATA).read_bytes())

    def has_train_state(self, step: int) -> bool:
        """Whether more than weights was saved with a step (a conversion has only weights)."""
        return any(not name.startswith("params/") for name in self.metadata(step)["arrays"])

    def verify(self, step: int) -> None:
        """Checks every file of a step. Raises UserError when it is missing or damaged."""
        self._require(step)
        self._refuse_damage(step, ("",))

    def read_file(self, step: int, name: str) -> bytes:
        """One of the small files that were saved with a step, such as tokenizer.json."""
        self._require(step)
        self._refuse_damage(step, (name,))
        try:
            return (self.path(step) / name).read_bytes()
        except FileNotFoundError:
            raise UserError(f"the checkpoint {self.path(step)} has no file {name}") from None

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Reads a state, after checking the checksums of the files that it lies in.

        `abstract_state` is a pytree like the one saved, with a jax.ShapeDtypeStruct (shape, dtype,
        sharding; without a sharding the first local device) for each array; the result has its
        structure, shardings and devices, which may differ from those at the save. Give
        `{"params": …}` to read the weights alone: the rest is neither read nor checked.

        Raises UserError when the step is missing or damaged (naming the older one to take), or
        when names, shapes or dtypes are not those saved.
        """
        wanted = named_leaves(abstract_state)
        trees = item_trees(wanted)
        saved = self.metadata(step)["arrays"]
        self._refuse_mismatch(step, wanted, saved, list(trees))
        self._refuse_damage(step, [f"{item}/" for item in trees])
        restored: dict[Name, jax.Array] = {}
        for item, tree in trees.items():
            if storage.is_remote(self.folder):
                leaves = {"/".join(name): leaf for name, leaf in named_leaves(tree)}
                read = read_arrays(open_arrays(self.path(step) / item, leaves), leaves)
                prefix = () if item == "train_state" else (item,)
                restored |= {(*prefix, *name.split("/")): leaf for name, leaf in read.items()}
                continue
            arguments = ocp.args.PyTreeRestore(
                item=tree, restore_args=jax.tree.map(_restore_args, tree)
            )
            where = epath.Path(self.path(step) / item)
            tree = ocp.PyTreeCheckpointHandler().restore(where, args=arguments)
            prefix = () if item == "train_state" else (item,)
            restored |= {prefix + name: leaf for name, leaf in named_leaves(tree)}
        return jax.tree.unflatten(
            jax.tree.structure(abstract_state), [restored[name] for name, _ in wanted]
        )

    def tensors(self, step: int, item: str = "params") -> dict[str, ts.TensorStore]:
        """The arrays of one item, opened but not read, by name ("layers/attention/wq").

        For reading slices of models that do not fit in memory; `tensors(...)[name][i].read()`
        gives a future of a numpy array. The checksums of the item are checked first.
        """
        saved = self.metadata(step)["arrays"]
        self._refuse_damage(step, (f"{item}/",))
        inner = []
        for name in saved:
            top, _, rest = name.partition("/")
            if (top == "params") == (item == "params"):
                inner.append(rest if item == "params" else name)
        return open_arrays(self.path(step) / item, inner)

    def _all_steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        matches = (re.fullmatch(r"step(\d+)", path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def _require(self, step: int) -> None:
        if not (self.path(step) / MANIFEST).is_file():
            there = ", ".join(map(str, self.steps())) or "none"
            raise UserError(
                f"there is no complete checkpoint of step {step} in {self.folder}; "
                f"complete steps: {there}"
            )

    def _refuse_damage(self, step: int, prefixes: list[str] | tuple[str, ...]) -> None:
        """Raises UserError on every process when any of them finds damage in its share."""
        share = slice(jax.process_index(), None, jax.process_count())
        damage = first_damage(self.path(step), prefixes, share)
        if jax.process_count() > 1:
            found = multihost_utils.process_allgather(np.bool_(damage is not None))
            if np.any(found) and damage is None:
                damage = "another process found a file that is not as written"
        if damage is None:
            return
        older = next(self._sound_steps_before(step), None)
        advice = (
            f"take step {older}, whose checksums hold, by moving {self.path(step)} elsewhere"
            if older is not None
            else "there is no older complete checkpoint whose checksums hold"
        )
        raise UserError(f"the checkpoint {self.path(step)} is damaged: {damage}; {advice}")

    def _sound_steps_before(self, step: int) -> Iterator[int]:
        for older in reversed(self.steps()):
            if older < step and first_damage(self.path(older)) is None:
                yield older

    def _refuse_mismatch(
        self, step: int, wanted: list[tuple[Name, Any]], saved: dict[str, Any], items: list[str]
    ) -> None:
        here = {"/".join(name): (list(leaf.shape), str(leaf.dtype)) for name, leaf in wanted}
        there = {
            name: (entry["shape"], entry["dtype"])
            for name, entry in saved.items()
            if ("params" if name.startswith("params/") else "train_state") in items
        }
        differ = [name for name in sorted(here | there) if here.get(name) != there.get(name)]
        if differ:
            name = differ[0]
            raise UserError(
                f"the checkpoint {self.path(step)} holds another state than is asked for: "
                f"{len(differ)} arrays differ, the first is {name}: saved "
                f"{_array_text(there.get(name))}, asked for {_array_text(here.get(name))}; "
                "use the model and optimizer that it was saved with"
            )


def find_checkpoint(
    path: str | Path, step: int | None = None
) -> tuple[CheckpointReader, int] | None:
    """The checkpoint that a path means: a run folder's newest complete one (or that of `step`), or
    the folder of one checkpoint. None when the path is neither. Raises UserError for an empty run.
    """
    path = storage.location(path)
    if re.fullmatch(r"step\d+", path.name) and (path / METADATA).is_file():
        return CheckpointReader(path.parent), int(path.name.removeprefix("step"))
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    if not folder.is_dir():
        return None
    reader = CheckpointReader(folder)
    step = reader.latest() if step is None else step
    if step is None:
        raise UserError(f"{path}: the run has no complete checkpoint yet")
    return reader, step


def _array_text(entry: tuple[list[int], str] | None) -> str:
    return "nothing" if entry is None else f"{entry[1]}{entry[0]}"


def _restore_args(leaf: Any) -> ocp.ArrayRestoreArgs:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)
