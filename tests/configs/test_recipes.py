"""Every published recipe: what its gin file resolves to is what the original's files say.

`published.json` was derived from the originals' configuration files and their own scheduler code,
not from ours; each entry names its source.
"""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from olmo_jax.config import load_config
from olmo_jax.model.presets import PRESETS, preset
from olmo_jax.train.plan import Plan

ROOT = Path(__file__).parents[2]
PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())["recipes"]
FILES = sorted(
    str(path.relative_to(ROOT / "configs"))
    for path in ROOT.glob("configs/*/*.gin")
    if path.stem != "base"
)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_every_recipe_is_held_to_a_source():
    assert set(FILES) == set(PUBLISHED)
    assert all(entry["source"] for entry in PUBLISHED.values())


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_is_the_published_one(name):
    run, entry = load_config([f"configs/{name}"]), PUBLISHED[name]
    values = run.as_json()
    for binding, expected in entry["bindings"].items():
        component, field = binding.split(".")
        if field == "preset":
            assert all(
                values["Model"][name] == value
                for name, value in asdict(preset(expected)).items()
                if name not in ("compute_dtype", "remat")
                and f"Model.{name}" not in entry["bindings"]
            )
            continue
        value = values[component][field]
        value = list(value) if isinstance(value, tuple) else value
        assert value == expected, binding
    if not entry.get("learning_rate"):
        return
    plan = Plan(run)
    assert plan.tokens_after(1) == entry["tokens_per_step"]
    for step, rate in entry["learning_rate"].items():
        assert plan.learning_rate(int(step) - 1) == pytest.approx(rate, rel=1e-14, abs=0), step
    for step, norm in (entry.get("clip_norm") or {}).items():
        assert plan.clip_norm(int(step) - 1) == norm, step


def test_every_preset_with_a_recipe_is_trained_by_it():
    for name, released in PRESETS.items():
        if released.recipe:
            trained = load_config([released.recipe]).model
            assert trained.parameter_count() == preset(name).parameter_count(), name


@pytest.mark.parametrize("size", ["7b", "32b"])
def test_olmo3_pre_training_saw_the_tokens_that_its_preset_says(size):
    entry = PUBLISHED[f"olmo3/{'7b_part2' if size == '7b' else size}.gin"]
    assert entry["tokens"] == PRESETS[f"olmo3_{size}"].tokens


def test_the_second_part_of_olmo3_7b_goes_on_at_the_first_ones_rate():
    first, second = (Plan(load_config([f"configs/olmo3/7b{p}.gin"])) for p in ("", "_part2"))
    assert first.run.train.stop_at == 597_046
    at = 597_046 - 1
    assert second.learning_rate(at) == pytest.approx(first.learning_rate(at), rel=1e-5)


def test_pythias_rate_is_near_the_cosine_to_a_tenth_that_its_paper_names():
    plan = Plan(load_config(["configs/pythia/70m.gin"]))
    assert plan.learning_rate(1429) == 1e-3
    assert plan.learning_rate(142_999) == 1e-4
    rates = [plan.learning_rate(step) for step in range(1429, 143_000, 1000)]
    assert rates == sorted(rates, reverse=True)
