"""Training instances as text, with the documents that they came from.

For people who ask what the model saw; nothing here is on the way of training.
"""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from olmo_jax.data.dataset import DataSet
from olmo_jax.data.tokenizer import load_tokenizer


def describe_instance(
    dataset: DataSet, n: int, tokenizer: Tokenizer | str | Path, data_from_step: int = 0
) -> str:
    """The n-th instance of the data's order: where it lies, its documents, its text; and the step
    of a run with this Train.data_from_step that consumes it.

    A document is given as [start, end) tokens of its file, id, and source file with line. Raises
    UserError for a tokenizer that cannot be opened.
    """
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)
    row = dataset.instance(n)
    n_tokens = int(np.count_nonzero(row.segment_ids_T))
    step = dataset.step_of(n) + 1 - data_from_step
    when = f"step {step:,} (from 1)" if step >= 1 else "before the run's first step"
    lines = [
        f"instance {row.instance_id}, the {n:,}-th of the order (from 0), {when}: "
        f"{n_tokens} tokens, {int(row.loss_mask_T.sum())} targets"
    ]
    done = 0
    for place in dataset.where(row.instance_id):
        length = place.end - place.start
        lines += ["", f"{place.path} tokens [{place.start}, {place.end})"]
        lines += [
            f"  document [{d.start}, {d.end}) {d.id}  {d.src}:{d.loc}" for d in place.documents
        ]
        ids = row.tokens_T[done : done + length].tolist()
        lines += ["", tokenizer.decode(ids, skip_special_tokens=False)]
        done += length
    return "\n".join(lines)
