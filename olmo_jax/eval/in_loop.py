"""The evaluator that runs tasks while a model trains."""

from collections.abc import Callable, Sequence

from jax.sharding import Mesh
from tokenizers import Tokenizer

from olmo_jax.eval.metrics import compute
from olmo_jax.eval.run import Requests
from olmo_jax.eval.scoring import Scorer
from olmo_jax.eval.tasks import expand, load_task
from olmo_jax.model.transformer import Transformer


class Tasks:
    """Calls with a model and a step give {"eval/TASK/METRIC": value} of every task.

    The requests are encoded once, and the programs are compiled at the first call. Raises UserError
    for an unknown task, or one whose answers are longer than the model reads, before that.
    """

    def __init__(
        self,
        names: Sequence[str],
        tokenizer: Tokenizer,
        eos_id: int | None,
        limit: int | None,
        max_length: int,
        mesh: Callable[[], Mesh],
    ):
        tasks = [load_task(label, limit) for label in expand(names)]
        self.requests = Requests(tasks, tokenizer, eos_id)
        self.requests.refuse_longer(max_length)
        self._mesh = mesh
        self._scorer: Scorer | None = None

    def __call__(self, model: Transformer, step: int) -> dict[str, float]:
        if self._scorer is None:
            self._scorer = Scorer(model, mesh=self._mesh())
        self._scorer.model = model
        scores = dict(self._scorer(self.requests.pairs))
        self._scorer.model = None  # type: ignore[assignment]  # its weights are donated next
        return {
            f"eval/{task.name}/{name}": value
            for task, answered in self.requests.answered(scores)
            for name, value in compute(task.metric, answered).items()
        }
