"""From documents to token files in one go: tag, de-duplicate, decontaminate, mix, tokenize.

A recipe is a YAML file. Everything goes into one folder, with a data card; the same command again
goes on where it stopped.
"""

import io
import json
import os
import platform
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from olmo_jax import storage
from olmo_jax.curate.card import write_card
from olmo_jax.curate.config import Config, parse_config
from olmo_jax.curate.decontaminate import DecontaminateConfig, Questions, write_index
from olmo_jax.curate.dedupe import dedupe
from olmo_jax.curate.dedupe_config import BloomConfig, DedupeConfig, DeduperConfig
from olmo_jax.curate.documents import find_documents
from olmo_jax.curate.executor import Executor, claim, job_runner
from olmo_jax.curate.mix import (
    FilterConfig,
    MixConfig,
    OutputConfig,
    SpanReplacement,
    StreamConfig,
    have_attributes,
    mix,
)
from olmo_jax.curate.names import Known, of_taggers
from olmo_jax.curate.tag import tag
from olmo_jax.data.fingerprint import contents, fingerprint_files
from olmo_jax.data.tokenize import tokenize_documents
from olmo_jax.data.tokenizer import EOS, tokenizer_file
from olmo_jax.errors import UserError
from olmo_jax.files import replacing, write_file

_MODULES = {"olmo-jax": "olmo_jax"}
TAGS, CONTAMINATION = "tags", "contamination"


class SourceConfig(Config):
    """Documents that are sampled together."""

    documents: tuple[str, ...] = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)


class DedupeStep(DedupeConfig):
    """A step of de-duplication, in the order given; over all sources together."""

    bloom_filter: BloomConfig = BloomConfig()


class TokenizeStep(Config):
    """How the documents become tokens."""

    tokenizer: str
    eos_token: str = EOS
    keep_whitespace: bool = False
    """Do not strip the documents."""
    seed: int | None = 0
    """Shuffles the documents; null leaves them in the sources' order."""
    max_tokens_per_file: int = Field(default=1 << 26, gt=0)


class Recipe(Config):
    """A recipe. Attributes are named tags__<tagger>__<type>, contamination__ngram_overlap__<type>,
    and as `attribute_name` says."""

    out: str
    sources: dict[str, SourceConfig] = Field(min_length=1)
    tag: tuple[str, ...] = ()
    dedupe: tuple[DedupeStep, ...] = ()
    decontaminate: DecontaminateConfig | None = None
    filter: FilterConfig = FilterConfig()
    span_replacement: tuple[SpanReplacement, ...] = ()
    min_text_length: int = Field(default=0, ge=0)
    seed: int = 0
    """Of the sampling by weight."""
    tokenize: TokenizeStep

    @model_validator(mode="after")
    def _names_differ(self) -> "Recipe":
        names = [TAGS, CONTAMINATION, *(step.name for step in self.dedupe)]
        if len(set(names)) < len(names):
            raise ValueError(f"the dedupe steps need names of their own, other than {names[:2]}")
        for name in self.sources:
            if not name.replace("-", "_").isidentifier():
                raise ValueError(f"source {name!r}: must be letters, digits, - and _")
        return self


def build(
    content: Any,
    path: str,
    executor: Executor,
    quiet: bool = False,
    questions: Questions | None = None,
) -> dict[str, Any]:
    """Carries out a recipe (parsed YAML; `path` is for messages) and writes the data card; its
    facts. `questions` is asked for those of decontaminate.tasks. Raises UserError."""
    recipe = parse_config(content, Recipe, path)
    if storage.has_protocol(recipe.out):
        raise UserError(f"out = {recipe.out}: must be a folder of this machine")
    out = Path(recipe.out).absolute()
    # Mistakes in a filter come out before the work, and leave no mark of a recipe that is mended.
    streams = _streams(recipe, out)
    known = of_taggers(TAGS, recipe.tag) + Known(frozenset(map(_attribute, recipe.dedupe)))
    if recipe.decontaminate:
        known += of_taggers(CONTAMINATION, ["ngram_overlap"])
    first = [find_documents(source.documents)[0] for source in recipe.sources.values()]
    for stream in streams.streams:
        stream.check(None if any(map(have_attributes, first)) else known)
    claim(str(out), "recipe", {"recipe": recipe.model_dump(mode="json")})
    facts: dict[str, Any] = {"sources": _gather(recipe, out), "steps": []}
    steps = facts["steps"]
    # In the recipe's order, which says which of two duplicates stays.
    everything = [f"{out}/documents/{name}/*" for name in recipe.sources]
    if recipe.tag:
        tag(everything, recipe.tag, TAGS, executor, quiet)
        steps.append({"step": "tag", "taggers": list(recipe.tag)})
    for step in recipe.dedupe:
        settings = DedupeConfig.model_validate(step.model_dump(exclude={"bloom_filter"}))
        config = DeduperConfig(
            documents=tuple(everything), dedupe=settings, bloom_filter=step.bloom_filter
        )
        steps.append({"step": "dedupe", "name": step.name, **dedupe(config, executor, quiet)})
    if recipe.decontaminate:
        index = out / "evaluation_ngrams.npz"
        write_index(recipe.decontaminate, str(index), questions)
        tag(everything, [f"ngram_overlap:{index}"], CONTAMINATION, executor, quiet)
        sets = [*recipe.decontaminate.against, *recipe.decontaminate.tasks]
        steps.append({"step": "decontaminate", "sets": sets})
    facts["mix"] = mix(streams, executor, quiet)
    facts["tokens"] = _tokenize(recipe, out, executor, quiet)
    packages = ("olmo-jax", "numpy", "tokenizers", "msgspec", "rbloom", "rensa", "pycld2", "regex")
    facts["versions"] = {"python": platform.python_version()}
    facts["versions"] |= {p: version(p) for p in packages if find_spec(_MODULES.get(p, p))}
    facts["recipe"] = recipe.model_dump(mode="json")
    write_file(out / "card.json", json.dumps(facts, indent=1))
    write_card(facts, out / "README.md")
    return facts


def _attribute(step: DedupeConfig) -> str:
    part = step.documents or step.paragraphs
    assert part
    return part.attribute_name


def _gather(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Links the documents into out/documents/<source>/; remote ones are copied there."""
    found: dict[str, Any] = {}
    for name, source in recipe.sources.items():
        paths = find_documents(source.documents)
        folder = out / "documents" / name
        folder.mkdir(parents=True, exist_ok=True)
        for i, path in enumerate(paths):
            here = folder / f"{i:05}-{os.path.basename(path)}"
            if os.path.lexists(here):
                continue
            if storage.has_protocol(path):
                with storage.open_stream(path) as stream, replacing(here) as file:
                    shutil.copyfileobj(stream, io.BufferedWriter(file), 1 << 20)  # type: ignore[type-var]
            else:
                here.symlink_to(os.path.abspath(path))
        found[name] = {
            "weight": source.weight,
            "files": [[path, *contents(path)] for path in paths],
        }
    return found


def _streams(recipe: Recipe, out: Path) -> MixConfig:
    experiments = [TAGS] if recipe.tag else []
    experiments += [step.name for step in recipe.dedupe]
    experiments += [CONTAMINATION] if recipe.decontaminate else []
    return MixConfig(
        streams=tuple(
            StreamConfig(
                name=name,
                documents=(f"{out}/documents/{name}/*",),
                attributes=tuple(experiments),
                filter=recipe.filter,
                span_replacement=recipe.span_replacement,
                output=OutputConfig(
                    path=f"{out}/mixed",
                    min_text_length=recipe.min_text_length,
                    discard_fields=("attributes",),
                ),
                weight=source.weight,
                seed=recipe.seed,
            )
            for name, source in recipe.sources.items()
        )
    )


def _tokenize(recipe: Recipe, out: Path, executor: Executor, quiet: bool) -> dict[str, Any]:
    folder, step = out / "tokens", recipe.tokenize
    facts_file = out / "tokens.json"
    inputs = sorted(str(path) for path in (out / "mixed").glob("*.jsonl.gz"))
    tokenizer = tokenizer_file(step.tokenizer)
    sources = [*inputs] if storage.has_protocol(tokenizer) else [*inputs, tokenizer]
    newest = max(map(os.path.getmtime, filter(os.path.exists, sources)))
    if folder.exists() and not (facts_file.exists() and newest <= os.path.getmtime(facts_file)):
        shutil.rmtree(folder)
    if not folder.exists():
        done = tokenize_documents(
            inputs,
            folder,
            step.tokenizer,
            eos_token=step.eos_token,
            strip=not step.keep_whitespace,
            max_tokens_per_file=step.max_tokens_per_file,
            seed=step.seed,
            run=job_runner(executor, "tokenizing", quiet),
        )
        facts = {
            "files": [[f"tokens/{Path(f.path).name}", f.size] for f in done.files],
            "dtype": done.files[0].dtype,
            "documents": done.documents,
            "tokens": done.tokens,
            "empty": done.skipped,
            "eos_token_id": done.eos_token_id,
            "fingerprint": fingerprint_files(done.files, with_documents=False),
        }
        write_file(facts_file, json.dumps(facts))
    return json.loads(facts_file.read_bytes())
