"""Every schedule gives the originals' own values, and refuses what cannot be meant."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from olmo_jax.errors import UserError
from olmo_jax.train.config import RunConfig
from olmo_jax.train.plan import Plan
from olmo_jax.train.schedules import ScheduleConfig, learning_rate

CASES = json.loads((Path(__file__).parent / "golden.json").read_text())["schedules"]


def at_step(config, peak, step, total):
    return learning_rate(config, peak, step, 0, total, 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["config"]["kind"])
def test_equals_the_original(case):
    config = ScheduleConfig(**case["config"])
    values = [at_step(config, case["peak"], point, case["total"]) for point in case["points"]]
    assert values == pytest.approx(case["values"], rel=1e-15, abs=0)


def test_the_originals_cover_every_kind():
    kinds = {case["config"]["kind"] for case in CASES}
    assert kinds == {
        "cosine", "linear", "inverse_sqrt", "wsd", "constant", "constant_with_warmup",
        "cosine_linear_envelope", "power", "half_cosine", "sequential",
    }  # fmt: skip


def test_released_runs():
    """Values of facts/training.md, of OLMo 2's 1B (in tokens) and 7B (in steps)."""
    tokens = ScheduleConfig(units="tokens", warmup=8_388_608_000, length=5 * 10**12)
    step = 1_907_359
    rate = learning_rate(tokens, 4e-4, step, step * 512 * 4096, 0, 0)
    assert rate == pytest.approx(7.448728958032132e-05, rel=1e-15)
    steps = ScheduleConfig(warmup=2000, length=1_192_093)
    assert at_step(steps, 3e-4, 476_838, 0) == pytest.approx(0.00020712352850360292, rel=1e-15)
    assert at_step(steps, 3e-4, 928_000, 0) == pytest.approx(6.149881019683266e-05, rel=1e-15)


def test_extending_olmo3_joins_where_it_left():
    """Its cosine over 5T tokens and the half-cosine over 7T meet at the half of the cosine."""
    old_steps, new_steps = round(5e12 / 4194304), round(7e12 / 4194304)
    middle = old_steps // 2 + 1000
    before = at_step(ScheduleConfig(warmup=2000), 3e-4, middle, old_steps)
    after = at_step(ScheduleConfig(kind="half_cosine", warmup=middle), 3e-4, middle, new_steps)
    assert after == pytest.approx(before, rel=1e-5)


def test_a_floor_holds_the_cosine_up_after_the_warm_up():
    bare = ScheduleConfig(warmup=100, final_fraction=0.0)
    floored = ScheduleConfig(warmup=100, final_fraction=0.0, floor_fraction=0.1)
    for step in (1, 50, 100, 500, 800, 900, 999, 1000, 2000):
        rate = at_step(bare, 1.0, step, 1000)
        want = max(rate, 0.1) if step >= 100 else rate
        assert at_step(floored, 1.0, step, 1000) == want
    with pytest.raises(ValueError, match='goes with kind = "cosine"'):
        ScheduleConfig(kind="linear", floor_fraction=0.1)


def test_tokens_and_steps_give_the_same():
    steps = ScheduleConfig(kind="wsd", warmup=10, decay=20)
    tokens = ScheduleConfig(kind="wsd", warmup=10 * 4096, decay=20 * 4096, units="tokens")
    for step in range(1, 120):
        a = learning_rate(steps, 1e-3, step, step * 4096, 100, 100 * 4096)
        b = learning_rate(tokens, 1e-3, step, step * 4096, 100, 100 * 4096)
        assert a == pytest.approx(b, rel=1e-15)


@pytest.mark.parametrize("kind", ["wsd", "power"])
def test_stays_at_its_end_beyond_the_length(kind):
    config = ScheduleConfig(kind=kind, warmup=10, final_fraction=0.01)
    assert at_step(config, 1e-3, 100, 100) == pytest.approx(1e-5)
    assert at_step(config, 1e-3, 500, 100) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "cosin"}, "cosine"),
        ({"warm_up": 3}, "warm_up"),
        ({"warmup": -1}, "at least 0"),
        ({"warmup": 5, "warmup_fraction": 0.1}, "both given"),
        ({"final_fraction": 1.5}, "between 0 and 1"),
        ({"kind": "constant", "warmup": 5}, "constant_with_warmup"),
        ({"kind": "inverse_sqrt"}, "warm-up"),
        ({"kind": "cosine", "decay": 10}, "wsd"),
        ({"kind": "power", "warmup": 5, "exponent": 0.5}, "negative"),
        ({"stage_kinds": ("cosine", "linear")}, "sequential"),
        ({"kind": "sequential", "stage_kinds": ("cosine", "linear")}, "one length fewer"),
        (
            {"kind": "sequential", "stage_kinds": ("power", "linear"), "stage_lengths": (5,)},
            "warm-up",
        ),
    ],
)
def test_impossible_values_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(**fields)


def test_what_does_not_fit_the_run_is_refused_at_the_first_step():
    with pytest.raises(UserError, match="do not fit"):
        at_step(ScheduleConfig(kind="wsd", warmup=60, decay=60), 1e-3, 1, 100)
    with pytest.raises(UserError, match="final_fraction"):
        at_step(ScheduleConfig(kind="power", warmup=1, final_fraction=0.5), 1e-3, 1, 1000)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {
                "kind": "sequential",
                "stage_kinds": ("cosine", "wsd"),
                "stage_lengths": (90,),
                "stage_decays": (0, 11),
            },
            "do not fit",
        ),
        ({"kind": "power", "warmup": 5, "final_fraction": 0.9}, "power has fallen to"),
        (
            {"kind": "inverse_sqrt", "warmup_fraction": 0.001},
            "warmup_fraction = 0.001 of 100 steps",
        ),
    ],
)
def test_what_would_be_refused_at_some_step_is_refused_by_the_plan(fields, message):
    def plan(**schedule):
        return Plan(
            RunConfig.from_json(
                {
                    "Model": dict.fromkeys(("vocab_size", "n_layers", "n_heads", "mlp_width"), 4)
                    | {"d_model": 8},
                    "Schedule": schedule,
                    "Train": {"steps": 100},
                }
            )
        )

    assert plan(kind="cosine").learning_rate(99) > 0
    with pytest.raises(UserError, match=message):
        plan(**fields)
