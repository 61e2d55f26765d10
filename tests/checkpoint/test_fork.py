"""A fork is a whole run folder that starts from a sound checkpoint, or it is not there."""

import pytest
from checkpoint_worker import CONFIG, abstract, identical, make_state
from test_checkpoint_kill import disk

from olmo_jax.checkpoint import Checkpointer, CheckpointReader
from olmo_jax.checkpoint.fork import fork
from olmo_jax.errors import UserError


@pytest.fixture
def run(tmp_path):
    with Checkpointer(tmp_path / "run" / "checkpoints", CONFIG) as checkpointer:
        checkpointer.save(3, make_state(3), {"n": 12})
        checkpointer.save(20, make_state(20), {"n": 80})
    return tmp_path / "run"


def test_a_fork_of_a_fork_is_sound_and_names_where_it_comes_from(run, tmp_path):
    assert fork(run, tmp_path / "a", 3) == 3
    assert fork(tmp_path / "a", tmp_path / "b") == 3
    for name, parent in (("a", run), ("b", tmp_path / "a")):
        reader = CheckpointReader(tmp_path / name / "checkpoints")
        assert reader.steps() == [3]
        reader.verify(3)
        assert identical(reader.restore(3, abstract(make_state(3))), make_state(3))
        assert reader.metadata(3)["forked_from"] == {"run": str(parent), "step": 3}


def test_a_fork_that_fails_half_way_leaves_nothing(run, tmp_path):
    with disk(tmp_path / "small", "size=40k") as small:
        with pytest.raises(UserError, match=r"cannot write .*new: the disk is full"):
            fork(run, small / "new")
        assert list(small.iterdir()) == []


def test_a_folder_in_use_is_refused_and_an_empty_one_is_taken(run, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        fork(run, tmp_path / "used")
    assert fork(run, tmp_path / "empty") == 20
