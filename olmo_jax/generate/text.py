"""Text in, text out, as it comes: ids to characters without cutting one in half."""

from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer

from olmo_jax.generate.engine import generate
from olmo_jax.generate.sampling import Sampling
from olmo_jax.model.transformer import Transformer


def generate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    sampling: Sampling | None = None,
    *,
    eos_id: int | None,
    seed: int = 0,
    ids: list[int] | None = None,
) -> Iterator[str]:
    """What follows a prompt, piece by piece, up to the model's `eos_id` (None: it has none).

    The ids are added to `ids` as they come. Raises UserError as `generate` does.
    """
    prompt_ids = encode_prompt(tokenizer, prompt, eos_id)
    stream = generate(model, prompt_ids, max_tokens, sampling, seed=seed, eos_id=eos_id)
    return _pieces(tokenizer, stream, [] if ids is None else ids)


def encode_prompt(tokenizer: Tokenizer, prompt: str, eos_id: int | None) -> list[int]:
    """A prompt's ids; an empty one is the eos, which begins a document."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    return ids or ([] if eos_id is None else [eos_id])


def _pieces(tokenizer: Tokenizer, stream: Iterator[int], ids: list[int]) -> Iterator[str]:
    """Text as soon as its bytes are whole: a token may end inside a character."""
    held: list[int] = []
    for i in stream:
        ids.append(i)
        held.append(i)
        text = _decode(tokenizer, held)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text
            held = []
    if held:
        yield _decode(tokenizer, held)


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)
