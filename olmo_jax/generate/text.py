"""Text in, text out, as it comes: ids to characters without cutting one in half."""

from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer

from olmo_jax.generate.decode import generate
from olmo_jax.generate.sampling import Sampling
from olmo_jax.model.transformer import Transformer

_EOS = "<|endoftext|>"


def generate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
) -> Iterator[str]:
    """What follows a prompt (an empty one begins a document), piece by piece, up to an eos.

    Raises UserError as `generate` does.
    """
    eos = tokenizer.token_to_id(_EOS)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids and eos is not None:
        ids = [eos]
    return _pieces(tokenizer, generate(model, ids, max_tokens, sampling, seed=seed, eos_id=eos))


def _pieces(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Text as soon as its bytes are whole: a token may end inside a character."""
    held: list[int] = []
    for i in ids:
        held.append(i)
        text = _decode(tokenizer, held)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text
            held = []
    if held:
        yield _decode(tokenizer, held)


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)
