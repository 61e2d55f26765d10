"""A profile of some steps, for TensorBoard's and XProf's trace viewer and for Perfetto."""

from collections.abc import Callable
from pathlib import Path

import jax


class Profile:
    """Records from before the first of `steps` (counted from 1) to the end of the last.

    A context manager, so that a profile under way is kept when the run ends. The first process
    alone records, its own devices.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, enabled: bool = True):
        self.steps, self.folder = steps if enabled else None, folder
        self.recording = False

    def before(self, step: int) -> None:
        """Step `step` is about to be dispatched."""
        if self.steps and self.steps[0] <= step <= self.steps[1] and not self.recording:
            jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True)
            self.recording = True

    def after(self, step: int, finish: Callable[[], None], tell: Callable[[str], None]) -> None:
        """Step `step` was dispatched; `finish` waits for it."""
        if self.recording and self.steps and step >= self.steps[1]:
            finish()
            first, last = self.steps
            self._stop()
            tell(
                f"profile of steps {first} to {last}: `tensorboard --logdir={self.folder}` shows "
                "it, and Perfetto opens its perfetto_trace.json.gz"
            )

    def _stop(self) -> None:
        self.recording, self.steps = False, None
        jax.profiler.stop_trace()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self.recording:
            self._stop()
