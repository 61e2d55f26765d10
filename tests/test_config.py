"""gin at the door: what is read, what is refused and how, and that to_gin is the inverse."""

import json
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from olmo_jax.config import load_config, to_gin
from olmo_jax.errors import UserError
from olmo_jax.model.presets import PRESETS, preset
from olmo_jax.train.config import RunConfig

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.gin"))
SMALL = [
    "Model.vocab_size=512",
    "Model.d_model=64",
    "Model.n_layers=2",
    "Model.n_heads=4",
    "Model.mlp_width=128",
    "Data.paths=('tokens.npy',)",
    "Train.steps=10",
]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def load(tmp_path, text, *bindings, **options):
    (tmp_path / "test.gin").write_text(text)
    return load_config([str(tmp_path / "test.gin")], [*SMALL, *bindings], **options)


def refusal(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and "pydantic" not in message and "https" not in message
    return message


# --- there and back -----------------------------------------------------------------------------


def is_same_after_writing(run: RunConfig, folder: Path) -> None:
    (folder / "again.gin").write_text(to_gin(run), encoding="utf-8")
    assert load_config([str(folder / "again.gin")]) == run
    assert RunConfig.from_json(json.loads(json.dumps(run.as_json()))) == run


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_each_released_configuration_is_the_same_after_writing(path, tmp_path):
    bindings = [] if path.name == "demo.gin" else ["Data.paths=('tokens.npy',)"]
    if path.name == "base.gin":
        bindings += [b for b in SMALL if not b.startswith("Data")]
    is_same_after_writing(load_config([str(path)], bindings), tmp_path)


def values(hint) -> st.SearchStrategy:
    """Any value of a field's type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return st.lists(values(args[0]), max_size=30).map(tuple)
        return st.tuples(*map(values, args))
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=3)
    if args:
        return st.one_of(*map(values, args))
    return {
        int: st.integers(-2, 2**50),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: st.text(),
        NoneType: st.none(),
    }[hint]


@st.composite
def runs(draw) -> RunConfig:
    """A small run with many fields drawn anew; a value that the checks refuse is left out."""
    parts = {}
    for part, cls in get_type_hints(RunConfig).items():
        config = getattr(load_config([], SMALL), part)
        hints = get_type_hints(cls)
        names = draw(st.lists(st.sampled_from([f.name for f in fields(cls)]), max_size=8))
        for name in names:
            try:
                config = replace(config, **{name: draw(values(hints[name]))})
            except ValidationError:
                continue
        parts[part] = config
    return RunConfig(**parts)


@settings(max_examples=150, deadline=None)
@given(run=runs())
def test_any_configuration_is_the_same_after_writing(run, tmp_path_factory):
    is_same_after_writing(run, tmp_path_factory.getbasetemp())


def test_the_written_configuration_is_complete():
    run = load_config([], ["Model.preset='olmo2_7b'", *SMALL[-2:]])
    text = to_gin(run)
    for part, cls in get_type_hints(RunConfig).items():
        for field in fields(cls):
            assert f"\n{part.capitalize()}.{field.name} = " in text
    assert "preset" not in text


def test_json_of_another_version_is_refused_in_one_line():
    saved = load_config([], SMALL).as_json()
    saved["Model"]["colour"] = "red"
    del saved["Model"]["d_model"]
    saved["Sauce"] = {}
    message = refusal(lambda: RunConfig.from_json(saved))
    assert "colour" in message and "d_model not given" in message and "Sauce" in message


# --- what is read -------------------------------------------------------------------------------


def test_later_bindings_win_and_the_command_line_wins_over_files(tmp_path):
    (tmp_path / "base.gin").write_text("Train.seed = 1\nTrain.z_loss = 0.5\nData.seed = 1")
    run = load(tmp_path, "include 'base.gin'\nTrain.seed = 2\nData.seed = 2", "Train.seed=3")
    assert (run.train.seed, run.data.seed, run.train.z_loss) == (3, 2, 0.5)


def test_nothing_is_left_from_an_earlier_parse(tmp_path):
    load(tmp_path, "Train.seed = 7\nX = 1")
    assert load_config([], SMALL).train.seed == 0
    assert "%X" in refusal(lambda: load(tmp_path, "Train.seed = %X"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_base_and_other_bindings_override_it_in_any_order(name):
    rest = SMALL[-2:]
    whole = load_config([], [f"Model.preset='{name}'", *rest]).model
    assert whole == preset(name)
    before = load_config([], ["Model.n_layers=4", f"Model.preset='{name}'", *rest]).model
    assert before == replace(preset(name), n_layers=4)


def test_macros_lists_and_whole_floats(tmp_path):
    text = """
STEPS = 5e3
Train.steps = %STEPS
Schedule.length = %STEPS
Schedule.units = "tokens"
Train.heldout = ["a.npy", "b.npy"]
Data.batch_size_schedule = [[10, 16], [20, 32]]
"""
    run = load(tmp_path, text, "Train.steps=%STEPS", "STEPS=7e3", "Model.rope_theta=10000")
    assert run.train.steps == 7000 and isinstance(run.train.steps, int)
    assert run.schedule.length == 7000 and isinstance(run.schedule.length, int)
    assert run.train.heldout == ("a.npy", "b.npy")
    assert run.data.batch_size_schedule == ((10, 16), (20, 32))
    assert isinstance(run.model.rope_theta, float)


def test_blocks_of_bindings(tmp_path):
    assert load(tmp_path, "Train:\n  seed = 4\n  z_loss = 1e-5\n").train.seed == 4


def test_the_shell_needs_no_quotes_for_text():
    bindings = ["Train.run_dir=~/runs/a b#1", "Optimizer.kind=muon", "Data.dtype=uint16"]
    run = load_config([], [*SMALL, *bindings])
    assert run.train.run_dir == "~/runs/a b#1"
    assert (run.optimizer.kind, run.data.dtype) == ("muon", "uint16")


def test_includes_count_from_the_including_file_then_from_the_working_directory(
    tmp_path, monkeypatch
):
    (tmp_path / "work/inner").mkdir(parents=True)
    (tmp_path / "work/inner/near.gin").write_text("Train.seed = 1")
    (tmp_path / "work/near.gin").write_text("Train.seed = 2")
    (tmp_path / "work/far.gin").write_text("Data.seed = 3")
    (tmp_path / "work/inner/top.gin").write_text("include 'near.gin'\ninclude 'far.gin'")
    monkeypatch.chdir(tmp_path / "work")
    run = load_config(["inner/top.gin"], SMALL)
    assert (run.train.seed, run.data.seed) == (1, 3)


# --- what is refused, and how -------------------------------------------------------------------

# The text of a gin file's second line -> what the one line must contain.
MISTAKES = {
    "Optimzer.learning_rate = 1e-3": ["Optimzer", "test.gin:2", "did you mean Optimizer?"],
    "Optimizer.lerning_rate = 1e-3": ["test.gin:2", "did you mean Optimizer.learning_rate?"],
    "Train.learning_rate = 1e-3": ["test.gin:2", "did you mean Optimizer.learning_rate?"],
    "Train.colour = 1": ["Train has no field colour", "run_dir"],
    "Optimizer.learning_rate = '1e-3'": ["'1e-3'", "test.gin:2", "a finite number"],
    "Optimizer.learning_rate = 1e999": ["inf", "a finite number"],
    "Optimizer.kind = 'adamv'": ["'adamv'", "test.gin:2", '"muon"', "did you mean adamw?"],
    "Train.seed = 1.5": ["1.5", "a whole number"],
    "Train.seed = True": ["True", "a whole number"],
    "Train.tensorboard = 1": ["True or False"],
    "Train.tensorboard = true": ["test.gin:2", "write True"],
    "Train.run_dir = runs/x": ["test.gin:2", "needs quotes", '"runs/x"'],
    "Train.heldout = 'x.npy'": ["a tuple", "write ('x.npy',)"],
    "Optimizer.betas = (0.9,)": ["a tuple of 2"],
    "Optimizer.learning_rate = -1.0": ["learning_rate = -1.0", "test.gin:2", "above 0"],
    "Checkpoint.every = 0": ["every = 0", "test.gin:2", "greater than or equal to 1"],
    "Train.tokens = 100": ["test.gin:2", "give exactly one"],
    "Model.preset = 'olmo2_7'": ["test.gin:2", "did you mean 'olmo2_7b'?"],
    "Model.n_heads = 5": ["n_heads = 5", "test.gin:2"],
    "a/Train.seed = 1": ["scopes", "write Train.seed"],
    "Train.run_dir = @Model()": ["@Model", "test.gin:2"],
    "Train.run_dir = @somebody": ["@somebody", "test.gin:2"],
    "Train.run_dir = @gin.singleton()": ["@gin.singleton", "test.gin:2"],
    "Train.heldout = ('a', %NAMES)": ["%NAMES", "test.gin:2", "did you mean NAME?"],
    "Train.seed = %LOOP\nLOOP = %LOOP": ["circle"],
    "Train.seed = ": ["test.gin:2", "not gin syntax"],
    "Train.seed = (1,": ["test.gin", "not gin syntax"],
    "Train.seed": ["test.gin:2", "not gin syntax"],
    "Train.heldout = {[1]: 2}": ["test.gin", "not gin syntax"],
    "include 'bse.gin'": ["test.gin:2", "bse.gin", "did you mean base.gin?"],
    "include 'test.gin'": ["includes itself"],
    "import os": ["import os", "test.gin:2", "--allow_gin_imports"],
    "from os import path": ["from os import path", "test.gin:2"],
    "from __gin__ import dynamic_registration": ["imports are refused"],
    "include 'importing.gin'": ["import antigravity", "importing.gin:1", "--allow_gin_imports"],
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_that_says_where_and_what_instead(line, tmp_path):
    (tmp_path / "base.gin").write_text("Train.seed = 1")
    (tmp_path / "importing.gin").write_text("import antigravity")
    without = [b for b in SMALL if b.split("=")[0] not in line]
    (tmp_path / "test.gin").write_text(f"NAME = 'x'\n{line}\n")
    message = refusal(lambda: load_config([str(tmp_path / "test.gin")], without))
    for expected in MISTAKES[line]:
        assert expected in message


@pytest.mark.parametrize(
    ("binding", "expected"),
    {
        "Optimzer.learning_rate=1": ["did you mean Optimizer?", "command line"],
        "Optimizer.learning_rate=fast": ["'fast'", "a finite number"],
        "Data.paths=x.npy": ["write ('x.npy',)"],
        "Train.seed": ["--gin.Train.seed", "--gin.Name.field=value"],
        "Train.seed=1\nimport antigravity": ["one binding"],
        "import antigravity": ["one binding"],
        "include 'x.gin'": ["one binding"],
        "STEPS=3": ["no gin file uses a macro %STEPS"],
        "Train.tensorboard=false": ["write False"],
    }.items(),
)
def test_a_mistake_on_the_command_line_too(binding, expected):
    bindings = [b for b in SMALL if b.split("=")[0] != binding.split("=")[0]]
    message = refusal(lambda: load_config([], [*bindings, binding]))
    assert all(part in message for part in expected), message


def test_a_missing_gin_file_names_the_nearest():
    assert "did you mean 7b.gin?" in refusal(lambda: load_config(["configs/olmo2/7.gin"]))


def test_every_fault_of_a_configuration_is_named_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        load(tmp_path, "Train.seed = 'x'\nData.seed = 'y'\nCheckpoint.every = 0")
    lines = str(caught.value).splitlines()
    assert [line.split(".")[0].split(":")[0] for line in lines] == ["Data", "Train", "Checkpoint"]


def test_a_model_that_is_not_given_is_one_line():
    message = refusal(lambda: load_config([], SMALL[-2:]))
    assert "d_model" in message and "olmo2_7b" in message


def test_imports_run_when_they_are_allowed(tmp_path, monkeypatch):
    (tmp_path / "my_values.py").write_text(
        "import gin\n@gin.configurable\ndef twice(x):\n    return 2 * x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = "import my_values\nTrain.seed = @twice()\ntwice.x = 21\n"
    assert load(tmp_path, text, allow_imports=True).train.seed == 42
    assert "imports are refused" in refusal(lambda: load(tmp_path, text))
    assert "nothing" in refusal(lambda: load(tmp_path, text.partition("\n")[2]))
    unknown = refusal(lambda: load(tmp_path, "import my_valuez", allow_imports=True))
    assert "my_valuez" in unknown
