"""The plan of a run: how many steps, how many tokens by each, at which learning rate.

Pure arithmetic on the configuration and the data's batch-size schedule; steps are counted from 0.
"""

from olmo_jax.data.steps import Steps
from olmo_jax.train.config import RunConfig
from olmo_jax.train.optimizer import clip_threshold
from olmo_jax.train.schedules import check, learning_rate


class Plan:
    """What each step of a run is given. UserError when the schedule does not fit the run."""

    def __init__(self, run: RunConfig):
        self.run = run
        self.batches = Steps(run.data.batch_size, run.data.batch_size_schedule)
        if run.train.steps is not None:
            self.steps = run.train.steps
        else:
            assert run.train.tokens is not None
            instances = -(-run.train.tokens // run.data.sequence_length)
            last = self.first_n(0) + instances - 1
            self.steps = self.batches.step_of(last) + 1 - run.train.data_from_step
        first = run.train.data_from_step
        self.batch_sizes = self.batches.sizes_between(first, first + self.steps)
        self.tokens = self.tokens_after(self.steps)
        check(run.schedule, run.optimizer.learning_rate, self.steps, self.tokens)

    def tokens_after(self, steps: int) -> int:
        """Tokens that the first `steps` steps consume, padding included."""
        return (self.first_n(steps) - self.first_n(0)) * self.run.data.sequence_length

    def first_n(self, step: int) -> int:
        """The position in the data's order at which a step begins to read."""
        return self.batches.first_n(step + self.run.train.data_from_step)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, in float64."""
        return learning_rate(
            self.run.schedule,
            self.run.optimizer.learning_rate,
            step + 1,
            self.tokens_after(step + 1),
            self.steps,
            self.tokens,
        )

    def clip_norm(self, step: int) -> float:
        """The global norm to which a step's gradients are clipped; inf is no clipping."""
        return clip_threshold(self.run.optimizer, step + 1, self.tokens_after(step + 1))
