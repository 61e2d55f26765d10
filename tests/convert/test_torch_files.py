"""PyTorch's files: what torch wrote is read bit for bit without it, and torch reads ours."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from olmo_jax.convert.distcp import DistcpTensors, _classes, _entry, write_distcp
from olmo_jax.convert.safetensors_io import Planned
from olmo_jax.convert.torch_files import TorchTensors
from olmo_jax.convert.torch_write import write_state_dict
from olmo_jax.errors import UserError

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")


def _odd_state() -> dict[str, torch.Tensor]:
    """Strides, offsets, shared storages, no elements, no axes, and every type."""
    base = torch.arange(24.0).reshape(6, 4)
    return {
        "base": base,
        "transposed": base.t(),
        "inside": base[2:4, 1:3],
        "expanded": base[:1].expand(3, 4),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(torch.randn(5)),
        "bool": torch.tensor([True, False]),
        **{name: (torch.randn(7) * 50).to(getattr(torch, name)) for name in DTYPES},
    }


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _assert_equal(ours, theirs: dict[str, torch.Tensor]):
    assert ours.names() == set(theirs)
    for name, tensor in theirs.items():
        assert ours.shape(name) == tuple(tensor.shape), name
        assert f"torch.{ours.dtype(name)}" == str(tensor.dtype), name
        assert ours.read(name).tobytes() == _bits(tensor), name
        if tensor.ndim:
            assert ours.read(name, slice(1, 2)).tobytes() == _bits(tensor[1:2]), name


@pytest.fixture
def saved(tmp_path):
    state = _odd_state()
    torch.save(state, tmp_path / "model.pt")
    return tmp_path, state


def test_reads_what_torch_saved(saved):
    folder, state = saved
    _assert_equal(TorchTensors(folder, "model.pt"), state)


def test_reads_a_module_s_own_state_dict(tmp_path):
    state = torch.nn.Linear(3, 2).state_dict()  # an OrderedDict with attributes
    torch.save(state, tmp_path / "model.pt")
    _assert_equal(TorchTensors(tmp_path, "model.pt"), dict(state))


def test_reads_shards_by_their_index(saved):
    folder, state = saved
    names = sorted(state)
    shards = {"a.bin": names[: len(names) // 2], "b.bin": names[len(names) // 2 :]}
    for file, part in shards.items():
        torch.save({name: state[name] for name in part}, folder / file)
    where = {name: file for file, part in shards.items() for name in part}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    _assert_equal(TorchTensors(folder, "pytorch_model.bin"), state)

    index.write_text(json.dumps({"weight_map": where | {"more": "a.bin"}}))
    with pytest.raises(UserError, match=r"a\.bin: has no tensor more"):
        TorchTensors(folder, "pytorch_model.bin")
    index.write_text(json.dumps({"weight_map": where | {"more": "../a.bin"}}))
    with pytest.raises(UserError, match="outside its folder"):
        TorchTensors(folder, "pytorch_model.bin")
    (folder / "b.bin").unlink()
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(UserError, match=r"b\.bin: is missing"):
        TorchTensors(folder, "pytorch_model.bin")


def test_reads_the_other_byte_order(saved):
    folder, state = saved
    with zipfile.ZipFile(folder / "model.pt") as old, zipfile.ZipFile(folder / "b.pt", "w") as new:
        for member in old.infolist():
            data = old.read(member)
            if member.filename.endswith("/byteorder"):
                data = b"big"
            elif "/data/" in member.filename:  # storages of the doubles and the halves
                width = {"float64": 8, "float16": 2}.get(_owner(old, member, state), 1)
                data = np.frombuffer(data, f"u{width}").byteswap().tobytes()
            new.writestr(member.filename, data)
    tensors = TorchTensors(folder, "b.pt")
    for name in ("float64", "float16", "uint8"):
        assert tensors.read(name).tobytes() == _bits(state[name])


def _owner(archive, member, state):
    data = archive.read(member)
    return next((n for n in ("float64", "float16") if _bits(state[n]) == data), None)


def test_reading_imports_no_torch(saved):
    folder, _ = saved
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from olmo_jax.convert.torch_files import TorchTensors\n"
        "import olmo_jax.convert.distcp, olmo_jax.convert.torch_write\n"
        f"TorchTensors(Path({str(folder)!r}), 'model.pt').read('base')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class _Bomb:
    """A pickle that would run a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "ran"
    bomb = _Bomb(f"touch {mark}")
    torch.save({"w": torch.ones(2), "x": bomb}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt: its pickle names posix\.system") as error:
        TorchTensors(tmp_path, "model.pt")
    assert "\n" not in str(error.value)
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"x": bomb}))
    with pytest.raises(UserError, match=r"\.metadata: its pickle names posix\.system"):
        DistcpTensors(tmp_path)
    assert not mark.exists()
    torch.load(tmp_path / "model.pt", weights_only=False)  # the bomb is a live one
    assert mark.exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_files_are_named(saved, share):
    folder, _ = saved
    whole = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"model\.pt: is cut short or damaged"):
        TorchTensors(folder, "model.pt")


def test_other_files_are_named(saved):
    folder, state = saved
    with pytest.raises(UserError, match=r"none\.pt: is missing"):
        TorchTensors(folder, "none.pt")
    (folder / "text.pt").write_text("hello")
    with pytest.raises(UserError, match=r"no file of torch\.save"):
        TorchTensors(folder, "text.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"old\.pt: is in PyTorch's format of before 1\.6"):
        TorchTensors(folder, "old.pt")
    torch.save({"step": 3}, folder / "train.pt")
    with pytest.raises(UserError, match="is no state dict"):
        TorchTensors(folder, "train.pt")
    with zipfile.ZipFile(folder / "model.pt") as old:
        with zipfile.ZipFile(folder / "z.pt", "w", zipfile.ZIP_DEFLATED) as new:
            for member in old.namelist():
                new.writestr(member, old.read(member))
        with zipfile.ZipFile(folder / "less.pt", "w") as new:
            for member in old.namelist():
                if not member.endswith("/data/0"):
                    new.writestr(member, old.read(member))
    with pytest.raises(UserError, match="is compressed, which torch"):
        TorchTensors(folder, "z.pt")
    with pytest.raises(UserError, match="storage '0' is missing"):
        TorchTensors(folder, "less.pt")


def test_a_tensor_outside_its_storage_is_refused(tmp_path):
    torch.save({"w": torch.arange(4.0)}, tmp_path / "model.pt")
    model, far = tmp_path / "model.pt", tmp_path / "far.pt"
    with zipfile.ZipFile(model) as old, zipfile.ZipFile(far, "w") as new:
        for member in old.namelist():
            data = old.read(member)
            if member.endswith("data.pkl"):
                assert data.count(b"K\x04\x85") == 1  # the shape (4,)
                data = data.replace(b"K\x04\x85", b"K\x05\x85")
            new.writestr(member, data)
    with pytest.raises(UserError, match=r"shape \(5,\) reaches outside its storage of 4"):
        TorchTensors(tmp_path, "far.pt")


def _planned(state: dict[str, np.ndarray], dtype: str = "float32") -> list[Planned]:
    return [Planned(name, v.shape, dtype, lambda v=v: v) for name, v in state.items()]


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (5, 3), "b": (), "c": (0, 4), "d.weight": (300, 129), "e": (7,)}
    state = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return state | {"t": state["d.weight"].T}  # a view, whose bytes are in the other order


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_loads_what_we_write(tmp_path, dtype):
    state = _arrays()
    told = []
    write_state_dict(tmp_path / "model.pt", _planned(state, dtype), lambda *at: told.append(at))
    want = {n: torch.from_numpy(v.copy()).to(getattr(torch, dtype)) for n, v in state.items()}
    for mmap in (False, True):
        got = torch.load(tmp_path / "model.pt", weights_only=True, mmap=mmap)
        assert list(got) == list(want)
        for name, tensor in want.items():
            assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
            assert got[name].stride() == torch.empty(tensor.shape).stride(), name
    _assert_equal(TorchTensors(tmp_path, "model.pt"), want)
    assert told[-1][0] == told[-1][1] == sum(t.numel() * t.element_size() for t in want.values())
    before = (tmp_path / "model.pt").read_bytes()
    write_state_dict(tmp_path / "model.pt", _planned(state, dtype))
    assert (tmp_path / "model.pt").read_bytes() == before


def test_distributed_folder_of_torch_s_own_writer(tmp_path):
    state = {n: t for n, t in _odd_state().items() if n not in ("empty", "parameter")}
    dcp.save({"model": state, "optim": {"lr": 0.1}}, checkpoint_id=tmp_path, no_dist=True)
    _assert_equal(DistcpTensors(tmp_path), state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_distributed_folder_round_trip(tmp_path, dtype):
    state = _arrays()
    write_distcp(tmp_path, _planned(state, dtype), max_file_bytes=100_000)
    files = sorted(f.name for f in tmp_path.iterdir())
    assert files == [".metadata", "__0_0.distcp", "__0_1.distcp"] or len(files) > 3
    want = {n: torch.from_numpy(v.copy()).to(getattr(torch, dtype)) for n, v in state.items()}
    _assert_equal(DistcpTensors(tmp_path), want)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    write_distcp(tmp_path, _planned(state, dtype), max_file_bytes=100_000)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_damaged_distributed_folders_are_named(tmp_path):
    good = tmp_path / "good"
    write_distcp(good, _planned(_arrays()), max_file_bytes=100_000)

    def copy(name):
        shutil.copytree(good, tmp_path / name)
        return tmp_path / name

    gone = copy("gone")
    (gone / "__0_1.distcp").unlink()
    with pytest.raises(UserError, match=r"__0_1\.distcp: is missing, and model\.\S+ lies in it"):
        DistcpTensors(gone)
    cut = copy("cut")
    size = (cut / "__0_1.distcp").stat().st_size
    os.truncate(cut / "__0_1.distcp", size // 2)
    with pytest.raises(UserError, match=r"__0_1\.distcp: model\.\S+: is cut short"):
        tensors = DistcpTensors(cut)
        for name in sorted(tensors.names()):
            tensors.read(name)
    half = copy("half")
    os.truncate(half / ".metadata", 500)
    with pytest.raises(UserError, match=r"\.metadata: its pickle is damaged"):
        DistcpTensors(half)
    for old, new, message in (
        (b"__0_1.distcp", b"../../x.disc", r"names a file outside its folder, '\.\./\.\./x\.disc'"),
        (b"J\x2c\x01\x00\x00K\x81t", b"J\x2d\x01\x00\x00K\x81t", "hold|lies outside|not the"),
    ):
        bad = copy(f"bad{len(message)}")
        content = (bad / ".metadata").read_bytes()
        assert old in content
        (bad / ".metadata").write_bytes(content.replace(old, new, 1))
        with pytest.raises(UserError, match=message):
            DistcpTensors(bad)
    with pytest.raises(UserError, match="no OLMo-core checkpoint"):
        DistcpTensors(tmp_path)


def test_a_pickle_reaches_nothing_of_pythons_own(tmp_path):
    """BUILD with a pair sets attributes on whatever it is given, classes and functions too."""
    before = PurePosixPath("/a/b").name
    for module, name in _classes():
        state = b"N}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xs\x86b."  # (None, {"name": "x"})
        (tmp_path / ".metadata").write_bytes(b"\x80\x02" + f"c{module}\n{name}\n".encode() + state)
        with pytest.raises(UserError):
            DistcpTensors(tmp_path)
    assert PurePosixPath("/a/b").name == before == "b"
    for builtin in (int, str, tuple, dict):
        assert getattr(builtin, "name", None) is None


def test_chunks_that_overlap_are_refused():
    def entry(*offsets):
        chunks = [SimpleNamespace(state={"offsets": (at, 0), "sizes": (2, 3)}) for at in offsets]
        state = {
            "properties": SimpleNamespace(state=("float32",)),
            "size": (4, 3),
            "chunks": chunks,
        }
        places = {
            ("w", (at, 0)): {"relative_path": Path(__file__).name, "offset": 0, "length": 0}
            for at in offsets
        }
        return _entry(Path(__file__).parent, "w", state, places)

    assert len(entry(2, 0).chunks) == 2
    with pytest.raises(UserError, match="overlap"):
        entry(1, 0)
