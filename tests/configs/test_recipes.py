"""Every published recipe: what its gin file resolves to is what the original's files say.

`published.json` was derived from the originals' configuration files and their own scheduler code,
not from ours; each entry names its source.
"""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from olmo_jax.config import load_config
from olmo_jax.model.presets import preset
from olmo_jax.train.plan import Plan

ROOT = Path(__file__).parents[2]
PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())["recipes"]
FILES = sorted(
    str(path.relative_to(ROOT / "configs"))
    for path in ROOT.glob("configs/olmo*/*.gin")
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
