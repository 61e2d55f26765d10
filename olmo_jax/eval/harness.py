"""lm-evaluation-harness: `olmo_jax` as one of its models, and its command line with that model.

lm-eval (0.4.13) knows the models of its own table and those that have been registered in its
process; it looks for no entry points. So its command line is started from here:

    python -m olmo_jax.eval.harness run --model olmo_jax --model_args pretrained=RUN --tasks …

Neither this nor lm-eval's own part of the work imports torch.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import lm_eval.models  # noqa: F401  (before ours is registered, which would make it the only one)
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from olmo_jax.convert.load import load
from olmo_jax.errors import UserError
from olmo_jax.eval.scoring import Pair, Scorer
from olmo_jax.generate.chat import TextFiles, load_text_files
from olmo_jax.generate.engine import Engine, Request
from olmo_jax.generate.sampling import Sampling

# What a task may ask of generation, by lm-eval's (and transformers') names.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("olmo_jax")
class OlmoJax(TemplateLM):
    """Any checkpoint that `olmo_jax.load` takes, in lm-eval's place for a model.

    Requests are packed and batched by the Scorer and the Engine: lm-eval's batch_size and device
    are taken and change nothing. slots: texts that are generated at once. Raises UserError.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        step: int | None = None,
        revision: str | None = None,
        max_length: int | None = None,
        slots: int = 16,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        self.path = str(pretrained)
        self.model = load(pretrained, step, revision)
        self.files: TextFiles = load_text_files(pretrained, step, revision)
        if not self.files.eos_ids:
            raise UserError(f"{pretrained}: names no end-of-text token, which lm-eval needs")
        self.max_length = int(max_length or self.model.config.context_length)
        self.slots = int(slots)
        self.scorer = Scorer.on_all_devices(self.model)
        self.scorer.max_length = self.max_length
        begins = self.files.tokenizer.token_to_id(self.files.special_tokens.get("bos_token", ""))
        self._prefix = self.eot_token_id if begins is None else begins

    # --- what lm-eval asks about text -------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.files.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the beginning-of-text token, else the end's
        (as in lm-eval's hf)."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return self.path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:  # the tokenizer's own habit, but not twice
            add_special_tokens = not has_bos_prefix(string, self._decode([self.prefix_token_id]))
        encoding = self.files.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return encoding.ids

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.files.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Only whether there is one counts: `apply_chat_template` fills it in."""
        return "the model's own" if chat_template and self.files.chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if self.files.chat_template is None:
            raise UserError(f"{self.path}: has no chat template; leave --apply_chat_template out")
        render = self.files.chat_template.render
        return render(chat_history, add_generation_prompt=add_generation_prompt)

    # --- requests ---------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        pairs = [Pair(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        out: list[Any] = [None] * len(pairs)
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="Scoring") as bar:
            for i, score in self.scorer(pairs):
                out[i] = score.logprob, score.is_greedy
                if (strings := requests[i][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", strings, out[i])
                bar.update()
        return out

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for n, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            new = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += new
            owners += [n] * len(new)
        sums = np.zeros(len(requests))
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        np.add.at(sums, owners, [logprob for logprob, _ in scores])
        for request, value in zip(requests, sums.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums.tolist()

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        engine = Engine(self.model, slots=max(1, min(self.slots, len(requests))))
        texts: dict[int, tuple[int, list[int], list[str]]] = {}
        for n, request in enumerate(requests):
            context, options = request.args
            asked, stops = self._request(context, options, n)
            texts[engine.submit(asked)] = n, [], stops
        out = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Generating") as bar:
            while engine.busy:
                for event in engine.step():
                    n, ids, stops = texts[event.id]
                    ids += event.token_ids
                    text = self._decode(ids, skip_special_tokens=True)
                    stopped = any(stop in text for stop in stops)
                    if not (event.finish or stopped):
                        continue
                    if not event.finish:
                        engine.cancel(event.id)
                    out[n] = postprocess_generated_text(text, stops, None)
                    self.cache_hook.add_partial("generate_until", requests[n].args, out[n])
                    bar.update()
        return out

    def _request(self, context: str, options: dict, seed: int) -> tuple[Request, list[str]]:
        """A request of the engine, and the strings that end its text."""
        kwargs = dict(normalize_gen_kwargs(options, default_max_gen_toks=256))
        stops = handle_stop_sequences(kwargs.pop("until", None), eos=None)
        max_tokens: int = kwargs.pop("max_gen_toks")  # type: ignore[assignment]
        room = self.max_length - max_tokens
        if room < 1:
            raise UserError(
                f"max_gen_toks = {max_tokens} leaves no room for a prompt in the model's "
                f"{self.max_length} tokens: give less with --gen_kwargs max_gen_toks=…"
            )
        if kwargs.pop("do_sample"):
            kwargs["temperature"] = kwargs.get("temperature") or 1.0
        else:
            kwargs |= {"temperature": 0.0}
        if unknown := set(kwargs) - set(_SAMPLING):
            raise UserError(
                f"generation option {', '.join(sorted(unknown))}: there are do_sample, until, "
                f"max_gen_toks, {', '.join(_SAMPLING)}"
            )
        sampling = Sampling(**{k: v for k, v in kwargs.items() if v is not None})
        ids = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
        # Special tokens are no part of the text in which stops are looked for.
        added = self.files.tokenizer.get_added_tokens_decoder().items()
        ends = [i for i, token in added if token.special and token.content in stops]
        eos_ids = (*self.files.eos_ids, *ends)
        request = Request(tuple(ids), max_tokens, sampling, seed, eos_ids)
        return request, [stop for stop in stops if stop]


def evaluate(
    model: str,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """lm-eval's tasks (names or groups) on a model, in the form of `run.evaluate`'s results: each
    task's items hold the document's number, each metric's value, and what the model answered.

    include_path: a folder with more task files. limit: only so many documents of each task. Raises
    UserError for a task that lm-eval doesn't know.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(
            f"lm-eval has no task {', '.join(unknown)}: `lm-eval ls tasks` lists them; "
            "--include_path=FOLDER adds your own"
        )
    results = simple_evaluate(
        model=OlmoJax(model, step=step),
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
    )
    assert results is not None  # of the first process, and there is but one
    return {
        "model": model if step is None else f"{model} at step {step}",
        "limit": limit,
        "as_published": False,
        "harness": version("lm_eval"),
        "tasks": {
            name: _task(results["results"][name], samples)
            for name, samples in results["samples"].items()
        },
        "suites": {},
    }


def _task(metrics: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """lm-eval calls a metric `acc,none` after its filter, and its error `acc_stderr,none`."""
    values = {
        name.removesuffix(",none"): value
        for name, value in metrics.items()
        if "," in name and "_stderr," not in name and isinstance(value, int | float)
    }
    first = next(iter(values))
    name, _, kind = first.partition(",")
    stderr = metrics.get(f"{name}_stderr,{kind or 'none'}")
    kept = [s for s in samples if s["filter"] == (kind or "none")]
    return {
        "metric": first,
        "metrics": values,
        "stderr": stderr if isinstance(stderr, float) else None,
        "items": [
            {
                "doc": sample["doc_id"],
                "values": {first if m == name else m: sample[m] for m in sample["metrics"]},
                "answers": sample["filtered_resps"],
            }
            for sample in sorted(kept, key=lambda s: s["doc_id"])
        ],
    }


def main() -> None:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    from olmo_jax.cli_shared import print_error
    from olmo_jax.parallel.runtime import configure

    configure()
    try:
        cli_evaluate()
    except UserError as error:
        print_error(str(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
