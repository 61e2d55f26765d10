"""What may change between a checkpoint and the run that goes on from it."""

import pytest

from olmo_jax.errors import UserError
from olmo_jax.train.config import RunConfig
from olmo_jax.train.resume import differing_bindings, refuse_changes

CONFIG = RunConfig.from_json(
    {
        "Model": {"vocab_size": 9, "d_model": 8, "n_layers": 1, "n_heads": 1, "mlp_width": 8},
        "Train": {"steps": 10, "run_dir": "a"},
    }
).as_json()


def changed(component, field, value):
    return {**CONFIG, component: {**CONFIG[component], field: value}}


@pytest.mark.parametrize(
    "binding",
    [
        ("Mesh", "fsdp", 2),
        ("Model", "remat", "full"),
        ("Data", "workers", 3),
        ("Train", "stop_at", 4),
        ("Train", "run_dir", "b"),
    ],
)
def test_what_changes_no_number_may_change(binding):
    assert differing_bindings(changed(*binding), CONFIG) == []


@pytest.mark.parametrize(
    "binding", [("Model", "d_model", 9), ("Data", "seed", 2), ("Train", "steps", 11)]
)
def test_anything_else_is_listed(tmp_path, binding):
    now = changed(*binding)
    saved = {"config": CONFIG, "fingerprint": "x"}
    [line] = differing_bindings(now, CONFIG)
    component, field, value = binding
    assert line == f"{component}.{field} = {value} (was {CONFIG[component][field]})"
    with pytest.raises(UserError, match=f"{component}.{field} = {value}.*olmo-jax fork"):
        refuse_changes(now, "x", saved, tmp_path)
    refuse_changes(now, "y", {**saved, "forked_from": {"run": "a", "step": 1}}, tmp_path)


def test_a_tuple_and_its_json_list_are_the_same():
    now, saved = changed("Data", "paths2", (1, 2)), changed("Data", "paths2", [1, 2])
    assert differing_bindings(now, saved) == []


def test_changed_data_is_refused(tmp_path):
    refuse_changes(CONFIG, "x", {"config": CONFIG, "fingerprint": "x"}, tmp_path)
    with pytest.raises(UserError, match="the data is not that of the checkpoint"):
        refuse_changes(CONFIG, "y", {"config": CONFIG, "fingerprint": "x"}, tmp_path)


def test_fields_of_another_version(tmp_path):
    older = {**CONFIG, "Train": {**CONFIG["Train"]}}
    del older["Train"]["z_loss"]
    refuse_changes(CONFIG, "x", {"config": older, "fingerprint": "x"}, tmp_path)
    with pytest.raises(UserError, match=r"Train.z_loss = 0.1 \(was 0.0\)"):
        refuse_changes(
            changed("Train", "z_loss", 0.1), "x", {"config": older, "fingerprint": "x"}, tmp_path
        )
    newer = changed("Train", "warp", 9)
    with pytest.raises(UserError, match=r"warp is no field.*olmo-jax fork"):
        refuse_changes(CONFIG, "x", {"config": newer, "fingerprint": "x"}, tmp_path)
