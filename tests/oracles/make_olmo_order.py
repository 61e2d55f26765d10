"""Makes tests/data/olmo_order.json: what the originals' own loaders give each rank, step by step.

    python3.11 -m venv loaders && . loaders/bin/activate
    pip install torch==2.13.0 ai2-olmo==0.6.0 ai2-olmo-core==3.0.0
    python tests/oracles/make_olmo_order.py

Two epochs, with one process and with four, of two token files whose tokens are 0, 1, 2, …, so that
a row's first token says which it is. {name: {processes: [for each epoch: [for each step: [for each
rank: [the first token of each row]]]]}}. "olmo" also has the `global_indices.npy` that it writes,
as hex.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.utils.data
from olmo.data.iterable_dataset import IterableDataset
from olmo.data.memmap_dataset import MemMapDataset
from olmo_core.data import DataCollator, NumpyFSLDataset
from olmo_core.data.data_loader import NumpyDataLoaderBase

OUT = Path(__file__).parents[1] / "data" / "olmo_order.json"
T, BATCH, SIZES = 16, 8, (37 * 16 + 5, 22 * 16 + 9)
PROCESSES = (1, 4)


def token_files(folder: Path) -> list[str]:
    start, paths = 0, []
    for k, size in enumerate(SIZES):
        path = folder / f"part-{k}.npy"
        np.arange(start, start + size).astype(np.uint16).tofile(path)
        paths.append(str(path))
        start += size
    return paths


def first_tokens(rows) -> list[int]:
    rows = np.asarray(rows)
    assert rows.shape[1] == T and (np.diff(rows) == 1).all()
    return rows[:, 0].tolist()


def by_step(ranks: list[list[list[int]]]) -> list[list[list[int]]]:
    return [list(step) for step in zip(*ranks, strict=True)]


def olmo(paths: list[str], folder: Path, processes: int, indices: list[str]) -> list:
    """OLMo 0.6.0, as `build_train_dataloader` and the trainer's end of an epoch put it together."""
    dataset = MemMapDataset(*paths, chunk_size=T, memmap_dtype=np.uint16)
    loaders = []
    for rank in range(processes):
        order = IterableDataset(
            dataset,
            BATCH,
            seed=6198,
            epoch=0,
            shuffle=True,
            drop_last=True,
            world_size=processes,
            rank=rank,
            fs_local_rank=0,
            work_dir=folder / f"olmo-{processes}-{rank}",
        )
        collate = lambda rows: torch.stack([row["input_ids"] for row in rows])  # noqa: E731
        loader = torch.utils.data.DataLoader(
            order, batch_size=BATCH // processes, drop_last=True, collate_fn=collate
        )
        loaders.append((order, loader))
    epochs = []
    for epoch in range(2):
        ranks = []
        for order, loader in loaders:
            if order.epoch != epoch:
                order.reshuffle(epoch)
            ranks.append([first_tokens(batch) for batch in loader])
        indices.append(order.global_indices_file.read_bytes().hex())
        epochs.append(by_step(ranks))
    return epochs


def core(paths: list[str], folder: Path, processes: int, longest: int | None) -> list:
    """OLMo-core 3.0.0; `longest` is max_target_sequence_length."""
    loaders = []
    for rank in range(processes):
        dataset = NumpyFSLDataset(
            *paths,
            sequence_length=T,
            pad_token_id=0,
            eos_token_id=0,
            vocab_size=1000,
            max_target_sequence_length=longest,
        )
        work_dir = folder / f"core-{processes}-{rank}-{longest}"
        dataset.work_dir = work_dir
        dataset.prepare()
        loader = NumpyDataLoaderBase.wrap_numpy_dataset(
            dataset,
            global_batch_size=BATCH * T,
            collator=DataCollator(pad_token_id=0),
            work_dir=work_dir,
            seed=34521,
            dp_world_size=processes,
            dp_rank=rank,
            fs_local_rank=0,
        )
        loaders.append(loader)
    epochs = []
    for epoch in (1, 2):
        ranks = []
        for loader in loaders:
            loader.reshuffle(epoch)
            ranks.append([first_tokens(batch["input_ids"]) for batch in loader])
            loader.reset()
        epochs.append(by_step(ranks))
    return epochs


def main() -> None:
    out: dict = {"olmo": {}, "core": {}, "core_longest_64": {}, "global_indices": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = token_files(folder)
        for processes in PROCESSES:
            indices: list[str] = []
            out["olmo"][processes] = olmo(paths, folder, processes, indices)
            out["global_indices"] = indices
            out["core"][processes] = core(paths, folder, processes, None)
            out["core_longest_64"][processes] = core(paths, folder, processes, 4 * T)
    OUT.write_text(json.dumps(out) + "\n")


if __name__ == "__main__":
    sys.exit(main())
