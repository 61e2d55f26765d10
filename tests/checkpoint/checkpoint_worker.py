"""The process that the checkpoint tests start, kill and start again; not a test itself.

    python checkpoint_worker.py COMMAND FOLDER [ARGUMENT]…

Each command prints JSON lines. States are pure functions of the step, so that any process can say
what a checkpoint must hold.
"""

import json
import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from olmo_jax.checkpoint import CheckpointConfig, Checkpointer, CheckpointReader, RunFolder
from olmo_jax.errors import UserError

CONFIG = CheckpointConfig(every=20, ephemeral_every=5, keep_ephemeral=2, fixed_steps=(3,))


class State(NamedTuple):
    """As the training loop's: a tuple of very different things, some of them empty."""

    step: Any
    params: Any
    opt_state: Any
    skip: Any


def make_state(step: int, rows: int = 64) -> State:
    """A state that differs at every step, with optax's nested tuples in it."""
    rng = np.random.default_rng(step)
    params = {
        "embed": {"weight": jnp.asarray(rng.normal(size=(rows, 16)), jnp.float32)},
        "layers": {"mlp": {"up": jnp.asarray(rng.normal(size=(2, 16, 32)), jnp.float32)}},
    }
    optimizer = optax.adamw(1e-3)
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    return State(jnp.int32(step), params, opt_state, {"losses": jnp.full(8, step, jnp.float32)})


def abstract(state: Any, sharding: Any = None) -> Any:
    """Shapes and dtypes of a state; `sharding` for the arrays of more than one axis."""

    def leaf(x: jax.Array) -> jax.ShapeDtypeStruct:
        at = sharding if sharding is not None and x.ndim > 1 else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)

    return jax.tree.map(leaf, state)


def identical(a: Any, b: Any) -> bool:
    """Same structure, dtypes and bits."""
    same = jax.tree.map(
        lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b
    )
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(same)


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def save_steps(folder: str, first: str, last: str, rows: str = "64") -> None:
    """Saves every due step, one after the other, as a training loop does."""
    with Checkpointer(folder, CONFIG, files={"tokenizer.json": b"{}"}) as checkpointer:
        for step in range(int(first), int(last) + 1):
            if checkpointer.should_save(step):
                checkpointer.save(step, make_state(step, int(rows)), {"data_position": step * 4})
                say(started=step)
                checkpointer.wait()
                say(steps=checkpointer.steps())


def die_before_commit(folder: str, step: str) -> None:
    """Is killed when the data of a save are written and only the rename is missing."""
    rename = os.rename

    def killed(source: Any, target: Any) -> None:
        if Path(target).name == f"step{step}":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.rename = killed  # type: ignore[assignment]
    save_steps(folder, step, step)


def die_in_retention(folder: str, step: str, when: str) -> None:
    """Is killed before the first file of an old checkpoint is removed, or after the first."""

    def killed(path: Any, **_: Any) -> None:
        if ".removed" in str(path):
            if when == "after":
                next(file for file in Path(path).rglob("*") if file.is_file()).unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    shutil.rmtree = killed  # type: ignore[assignment]
    save_steps(folder, step, step)


def resume(folder: str) -> None:
    """Takes the newest checkpoint, as the start of a training loop does, and says what it got."""
    checkpointer = Checkpointer(folder, CONFIG)
    step = checkpointer.latest()
    state = make_state(step or 0)
    same = step is not None and identical(checkpointer.restore(step, abstract(state)), state)
    say(step=step, identical=same, steps=checkpointer.steps())


def on_mesh(folder: str, step: str) -> None:
    """Restores onto all of this process's devices, split along the second axis."""
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    state = make_state(int(step))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    got = CheckpointReader(folder).restore(int(step), abstract(state, sharding))
    devices = len(got.params["embed"]["weight"].sharding.device_set)
    say(devices=devices, identical=identical(got, state))


def fill_disk(folder: str, when: str) -> None:
    """On a 4 MB disk: one checkpoint that fits, one that does not, one that fits again.

    The lack of space is there at the start, or comes (as when others write too) in the middle.
    """
    if when == "middle":
        free = shutil.disk_usage(".")._replace(free=2**40)
        shutil.disk_usage = lambda _: free  # type: ignore[assignment]
    run = RunFolder(folder)
    run.open_for_writing()
    config = CheckpointConfig(every=1)
    with Checkpointer(run.checkpoints, config) as checkpointer:
        checkpointer.save(1, make_state(1, 2048), {})
        checkpointer.wait()
        checkpointer.save(2, make_state(2, 32768), {})
        error = None
        for _ in range(1000):
            try:
                checkpointer.check()
            except UserError as found:
                error = str(found)
                break
            time.sleep(0.01)
        left = sorted(path.name for path in run.checkpoints.iterdir())
        say(error=error, left=left, latest=checkpointer.latest())
        checkpointer.save(2, make_state(2, 2048), {})
        checkpointer.wait()
        say(steps=checkpointer.steps())
    open_refused(folder)


def open_refused(folder: str) -> None:
    """Says why a run folder is refused; on the disk of `fill_disk`, after filling it."""
    filler = Path(folder).parent / "filler"
    try:
        with open(filler, "wb", buffering=0) as file:
            while file.write(bytes(2**20)):
                pass
    except OSError:
        pass
    claim(folder)
    claim(folder + "-new")


def claim(folder: str) -> None:
    """Opens a run folder for writing and says why it cannot."""
    try:
        RunFolder(folder).open_for_writing()
        say(error=None)
    except UserError as error:
        say(error=str(error))


def many(folder: str, rank: str, port: str) -> None:
    """One of two processes with two devices each: both save, both restore."""
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    replicated = NamedSharding(mesh, PartitionSpec())

    def globally(x: jax.Array) -> jax.Array:
        return jax.make_array_from_callback(
            x.shape, sharding if x.ndim > 1 else replicated, lambda index: np.asarray(x)[index]
        )

    with Checkpointer(folder, CONFIG) as checkpointer:
        for step in (5, 10, 15):
            state = jax.tree.map(globally, make_state(step))
            checkpointer.save(step, state, {"data_position": step})
        checkpointer.wait()
        newest = checkpointer.latest()
        targets = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        restored = checkpointer.restore(newest, targets)
        mine = jax.tree.map(
            lambda x, y: all(
                bool((np.asarray(a.data) == np.asarray(b.data)).all())
                for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True)
            ),
            state,
            restored,
        )
        say(step=newest, identical=jax.tree.all(mine), steps=checkpointer.steps())
        sync_global_devices("restored")  # or the other reads what this one damages
        if rank == "0":
            file = max(
                (checkpointer.path(newest) / "params").rglob("d/*"), key=lambda p: p.stat().st_size
            )
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        sync_global_devices("damaged")
        try:
            checkpointer.restore(newest, targets)
            say(error=None)
        except UserError as error:
            say(error=str(error))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    _, command, *arguments = sys.argv
    commands = [
        save_steps,
        die_before_commit,
        die_in_retention,
        resume,
        on_mesh,
        fill_disk,
        open_refused,
        claim,
        many,
    ]
    {function.__name__: function for function in commands}[command](*arguments)
