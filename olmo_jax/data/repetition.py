"""The repetition filter of OLMo 2: which instances are too repetitive to learn from.

An instance that fails stays in the batch with its loss masked, so that the order does not change.
"""

import numpy as np

MAX_PERIOD = 13
MAX_COUNT = 32


def is_repetitive(tokens: np.ndarray) -> bool:
    """Whether some 1 to 13 tokens stand 32 times or more in a row in `tokens`.

    The rule of OLMo-core's `find_periodic_sequences` (repetition_max_period, _max_count): a stretch
    where every token equals the one `period` before it, `period * 31` long.
    """
    for period in range(1, MAX_PERIOD + 1):
        needed = period * (MAX_COUNT - 1)
        if len(tokens) < needed + period:
            break
        # A run of `needed` equal tokens has no different one inside: look at the gaps between.
        different = np.flatnonzero(tokens[period:] != tokens[:-period])
        edges = np.concatenate([[-1], different, [len(tokens) - period]])
        if np.diff(edges).max() - 1 >= needed:
            return True
    return False
