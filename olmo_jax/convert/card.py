"""The model card, README.md of an exported folder: what is known of the model, and nothing else.

Facts come from the checkpoint and its run folder (run_facts.py); the template lays them out.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from olmo_jax.convert.average import MeanSource
from olmo_jax.convert.run_facts import RunFacts
from olmo_jax.convert.source import Source
from olmo_jax.model.config import ModelConfig
from olmo_jax.numerals import count_text, size_text

Rows = list[tuple[str, str]]

# Of a model's fields those that say how it was trained or is computed, not what it computes.
_NOT_ARCHITECTURE = frozenset(
    (
        "init",
        "init_std",
        "embedding_init_std",
        "compute_dtype",
        "remat",
        "load_balancing_loss",
        "router_z_loss",
    )
)
# Fields, by how they begin, that mean nothing unless the configuration's kind is one of these.
_ONLY_WITH = {
    "rope_factor": ("linear", "llama3", "yarn"),
    "rope_original_": ("llama3", "yarn"),
    "rope_low_": ("llama3",),
    "rope_high_": ("llama3",),
    "rope_beta_": ("yarn",),
    "rope_attention_": ("yarn",),
    "muon_": ("muon",),
    "adam_learning_": ("muon",),
    "skip_": ("skip_step_adamw",),
    "exponent": ("power",),
}
# What begins or ends markup in a line; an underscore does not, inside a word.
_MARKUP = re.compile(r"[\\`*\[\]<>#|~&$]|(?<![^\W_])_|_(?![^\W_])")


def model_card(source: Source, class_name: str) -> str:
    """The card as Markdown, for transformers' class of that name."""
    config, facts = source.config, source.run_facts()
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        finalize=markdown,  # every value; the template's own text stays as it is
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    count = config.parameter_count()
    name = facts.name if facts and markdown(facts.name) else ""
    heldout = facts.heldout if facts else {}
    return templates.get_template("card.md.j2").render(
        title=name or f"{class_name}, {count_text(count)} parameters",
        class_name=class_name,
        parameters=f"{count:,}",
        active=f"{config.parameter_count(active=True):,}" if config.n_experts else "",
        averaged=source.names if isinstance(source, MeanSource) else [],
        has_tokenizer="tokenizer.json" in source.files,
        architecture=_architecture(config),
        training=list(_training(facts)) if facts else [],
        data=_data(facts) if facts else [],
        evaluation=list(_evaluation(heldout)),
        evaluated_step=_cell(heldout.get("step")),
    )


def markdown(value: Any) -> str:
    """Text as Markdown that shows it, on one line, whatever is in it: no markup, HTML or table
    cell begins or ends there."""
    shown = "".join(c if c.isprintable() else " " for c in str(value))
    return _MARKUP.sub(r"\\\g<0>", " ".join(shown.split()))


def _architecture(config: ModelConfig) -> Rows:
    """The fields that mean something for this model, by the names that they have in Model."""
    fields = {k: v for k, v in asdict(config).items() if k not in _NOT_ARCHITECTURE}
    if not config.n_experts:
        for name in ("n_experts", "experts_per_token", "normalize_expert_weights"):
            del fields[name]
    if config.position != "rope":
        fields = {k: v for k, v in fields.items() if not k.startswith("rope_")}
    return [(k, _cell(v)) for k, v in _used(fields, (config.rope_scaling,)).items()]


def _training(facts: RunFacts) -> Iterator[tuple[str, str]]:
    """What the run was told and where it was, as far as it is known."""
    metadata = facts.metadata
    parts = {name: _mapping(part) for name, part in _mapping(metadata["config"]).items()}
    train, data = parts.get("Train", {}), parts.get("Data", {})
    planned = _cell(train.get("steps"))
    sources = [_shared(name) for name in _list(train.get("init_from"))]
    forked = _mapping(metadata.get("forked_from"))
    rows = {
        "steps": _cell(metadata.get("step")) + (f" of {planned}" if planned else ""),
        "tokens": _cell(metadata.get("tokens")),
        "started from": ", ".join(sources),
        "forked from": f"{_shared(forked['run'])}, step {forked['step']}" if forked else "",
        "sequence length": _cell(data.get("sequence_length")),
        "batch size": _cell(data.get("batch_size")),
        "batch-size schedule": _cell(data.get("batch_size_schedule") or None),
        "seeds": _settings({"weights": train.get("seed"), "data": data.get("seed")}),
        "optimizer": _settings(parts.get("Optimizer", {})),
        "schedule": _settings(parts.get("Schedule", {})),
        "z_loss": _cell(train.get("z_loss") or None),
        "compute_dtype": _cell(parts.get("Model", {}).get("compute_dtype")),
        "data's fingerprint": _cell(metadata.get("fingerprint") or None),
        "ran (last) on": _machine(facts.environment),
        "software": _software(facts.environment),
    }
    yield from ((name, value) for name, value in rows.items() if value)


def _machine(environment: Mapping[str, Any]) -> str:
    if not {"devices", "device_kind"} <= set(environment):
        return ""
    text = f"{environment['devices']} x {environment['device_kind']}"
    if environment.get("platform") == "cpu" and {"cpu", "cores"} <= set(environment):
        text += f" ({environment['cpu']}, {environment['cores']} cores)"
    return text


def _software(environment: Mapping[str, Any]) -> str:
    names = [name for name in ("olmo-jax", "jax", "python") if name in environment]
    return ", ".join(f"{name} {environment[name]}" for name in names)


def _data(facts: RunFacts) -> list[list[str]]:
    """A head, and a row for each source of the run."""
    rows = [row for row in _list(facts.data.get("sources")) if isinstance(row, dict)]
    named = ("source", "files", "tokens", "documents", "instances", "share")
    names = [name for name in named if any(row.get(name) is not None for row in rows)]
    if not names:
        return []

    def cell(name: str, value: Any) -> str:
        return f"{value:.1%}" if name == "share" and isinstance(value, float) else _cell(value)

    return [names, *([cell(name, row.get(name)) for name in names] for row in rows)]


def _evaluation(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in row.items():
        if not name.startswith("heldout/") or not isinstance(value, int | float):
            continue
        label = name.removeprefix("heldout/").replace("_", " ")
        if label == "bytes":
            yield "size of the text", size_text(int(value))
        else:
            yield "loss, nats a token" if label == "loss" else label, _cell(value)


def _settings(fields: Mapping[str, Any]) -> str:
    """`name = value; …` of the fields that are given and used."""
    kinds = (fields.get("kind"), *_list(fields.get("stage_kinds")))
    used = _used(fields, kinds)
    return "; ".join(f"{name} = {_plain(value)}" for name, value in used.items())


def _used(fields: Mapping[str, Any], kinds: tuple[Any, ...]) -> dict[str, Any]:
    """The fields with a value, without those that belong to another kind."""
    return {
        name: value
        for name, value in fields.items()
        if value is not None
        and value not in ((), [])
        and all(
            set(only) & set(kinds)
            for beginning, only in _ONLY_WITH.items()
            if name.startswith(beginning)
        )
    }


def _cell(value: Any) -> str:
    """A value alone in its cell; thousands are marked. Nothing for None."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"({', '.join(map(_plain, value))})" if isinstance(value, list | tuple) else str(value)


def _shared(path: Any) -> str:
    """A path as others may see it: without the folders of this machine."""
    text = str(path)
    return Path(text).name if Path(text).expanduser().is_absolute() else text


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []
