"""Between steps and instances: which positions of the order a step consumes, and back.

Steps are counted from 0. Pure arithmetic on the batch-size schedule.
"""

from bisect import bisect_right


class Steps:
    """Batch sizes as a step function, from `batch_size` and (from_step, batch_size) pairs."""

    def __init__(self, batch_size: int, schedule: tuple[tuple[int, int], ...] = ()):
        self._from = [0]
        self._sizes = [batch_size]
        for step, size in schedule:
            if step == 0:
                self._sizes[0] = size
            else:
                self._from.append(step)
                self._sizes.append(size)
        self._first_n = [0]
        for k in range(1, len(self._from)):
            steps = self._from[k] - self._from[k - 1]
            self._first_n.append(self._first_n[-1] + steps * self._sizes[k - 1])

    def batch_size(self, step: int) -> int:
        return self._sizes[bisect_right(self._from, step) - 1]

    def first_n(self, step: int) -> int:
        k = bisect_right(self._from, step) - 1
        return self._first_n[k] + (step - self._from[k]) * self._sizes[k]

    def step_of(self, n: int) -> int:
        k = bisect_right(self._first_n, n) - 1
        return self._from[k] + (n - self._first_n[k]) // self._sizes[k]

    def sizes_between(self, first_step: int, last_step: int) -> set[int]:
        """The batch sizes that occur in steps [first_step, last_step)."""
        changes = {f for f in self._from if first_step < f < last_step}
        return {self.batch_size(step) for step in {first_step} | changes}

    @property
    def last_batch_size(self) -> int:
        return self._sizes[-1]
