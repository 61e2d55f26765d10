"""The configuration of de-duplication: Dolma's for its deduper, with `method`."""

from typing import Literal

from pydantic import Field, model_validator

from olmo_jax.curate.config import Compression, Config, WorkDir


class NgramConfig(Config):
    """Paragraphs by the n-grams of their Unicode words."""

    ngram_length: int = Field(default=0, ge=0)
    stride: int = Field(default=0, ge=0)
    """Words between the starts of n-grams; 0 or 1 takes them all."""
    overlap_threshold: float = 1.0
    """The share of a paragraph's n-grams that were seen before, from which it is marked."""
    skip_short_paragraphs: bool = False
    """Leave paragraphs of less than two n-grams; otherwise they are compared whole."""


class ParagraphConfig(Config):
    """Mark paragraphs that were seen before, in this document or another."""

    attribute_name: str
    by_ngram: NgramConfig | None = None
    paragraph_separator: str = Field(default="\n", min_length=1)


class DocumentConfig(Config):
    """Mark documents whose key was seen before."""

    attribute_name: str
    key: str
    """JSONPath: $.text, $.id, $.metadata.url."""


class MinHashConfig(Config):
    """When two documents are near-duplicates. The default bands find a pair of Jaccard similarity
    0.8 in 99.96 % of cases, one of 0.5 in 47 %, and the signatures are then compared."""

    permutations: int = Field(default=128, ge=16)
    bands: int = Field(default=16, ge=1)
    ngram_length: int = Field(default=5, ge=1)
    similarity: float = Field(default=0.7, gt=0, le=1)
    """Estimated from the signatures, below which a pair is not taken."""
    seed: int = 1


class DedupeConfig(Config):
    """What is compared, and how."""

    name: str
    """The experiment: attributes go to attributes/<name>/."""
    documents: DocumentConfig | None = None
    paragraphs: ParagraphConfig | None = None
    method: Literal["bloom", "exact", "minhash"] = "bloom"
    minhash: MinHashConfig = MinHashConfig()
    skip_empty: bool = False
    min_length: int = Field(default=0, ge=0)
    min_words: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_kind(self) -> "DedupeConfig":
        if (self.documents is None) == (self.paragraphs is None):
            raise ValueError("give either dedupe.documents or dedupe.paragraphs")
        if self.method == "minhash" and (self.documents is None or self.documents.key != "$.text"):
            raise ValueError(
                "minhash compares documents by their text: dedupe.documents.key=$.text"
            )
        return self


class BloomConfig(Config):
    """The Bloom filter's size, from the number of items and the rate of false positives."""

    file: str | None = None
    """Kept there afterwards; read first when it is there, so that later data are compared, too.
    The same documents again are compared with what it held before them."""
    read_only: bool = False
    estimated_doc_count: int = Field(default=1_000_000, gt=0)
    desired_false_positive_rate: float = Field(default=1e-5, gt=0, lt=1)
    size_in_bytes: int = Field(default=0, ge=0)
    """Instead of the two before it."""


class DeduperConfig(Config):
    """A deduper configuration."""

    documents: tuple[str, ...] = Field(min_length=1)
    dedupe: DedupeConfig
    bloom_filter: BloomConfig = BloomConfig()
    processes: int | None = None
    work_dir: WorkDir | None = None
    compression: Compression = Compression()
