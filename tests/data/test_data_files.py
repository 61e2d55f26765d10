"""Token files: what goes in comes out, and each mistake is one line that names file and offset."""

import gzip
import pickle

import numpy as np
import pytest
from pydantic import ValidationError

from olmo_jax.data import DataConfig, Document, open_dataset, write_token_file
from olmo_jax.data.token_files import read_documents, smallest_dtype
from olmo_jax.errors import UserError


def open_(*paths, vocab_size=1000, sequence_length=16, **settings):
    config = DataConfig(paths=tuple(map(str, paths)), sequence_length=sequence_length, **settings)
    return open_dataset(config, vocab_size)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_round_trip(tmp_path, dtype):
    tokens = np.arange(200, dtype=np.int64)
    rows = [Document(0, 150, 'a,"b"', "x, y.gz", 1), Document(150, 200, "é\nß", "", 7)]
    file = write_token_file(tmp_path / "a.npy", tokens, rows, dtype)
    assert (tmp_path / "a.npy").read_bytes() == tokens.astype(dtype).tobytes()
    assert file.documents() == rows
    assert pickle.loads(pickle.dumps(file)).tokens.tolist() == tokens.tolist()
    data = open_(file.path, dtype=dtype, order="sequential")
    assert data.instance(3).tokens_T.tolist() == list(range(48, 64))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv.gz", "a.npy"]


def test_fixed_instances_cut_each_file_and_drop_its_tail(write_tokens):
    files = [write_tokens(f"{k}.npy", [n], seed=k) for k, n in enumerate((40, 10, 65))]
    data = open_(*files, order="sequential")
    assert len(data) == 2 + 0 + 4
    places = [data.where(i)[0] for i in range(6)]
    assert [(p.path, p.start) for p in places[1:3]] == [(str(files[0]), 16), (str(files[2]), 0)]
    # 32 at 16: the tail is cut to multiples of 32 first
    assert len(open_(*files, max_target_sequence_length=32)) == 2 + 0 + 4
    assert len(open_(*files, max_target_sequence_length=64)) == 4
    with pytest.raises(UserError, match="no instance 6; the data has 0 to 5"):
        data.where(6)


def test_where_names_the_documents_of_an_instance(write_tokens):
    data = open_(write_tokens("a.npy", [10, 30, 5, 3]))
    (place,) = data.where(2)
    assert (place.start, place.end) == (32, 48)
    assert [d.id for d in place.documents] == ["a.npy-1", "a.npy-2", "a.npy-3"]
    assert place.documents[0] == Document(10, 40, "a.npy-1", "a, b.jsonl", 2)


def test_the_table(write_tokens):
    (row,) = open_(write_tokens("a.npy", [10, 30, 5, 3])).table()
    assert row == {
        "source": "data",
        "files": 1,
        "bytes": 96,
        "tokens": 48,
        "documents": 4,
        "instances": 3,
        "share": 1.0,
    }


def test_the_smallest_type():
    sizes = [256, 257, 50280, 65536, 65537, 100278]
    assert [smallest_dtype(v) for v in sizes] == ["uint8", *["uint16"] * 3, *["uint32"] * 2]


def test_globs_are_sorted_and_paths_keep_their_order(write_tokens, tmp_path):
    a, b, c = (write_tokens(f"{x}.npy", [20]) for x in "abc")
    data = open_(c, tmp_path / "[ab].npy")
    assert [f.path for f in data.sources[0].files] == [str(c), str(a), str(b)]


def test_mistakes_in_files(tmp_path, write_tokens):
    good = write_tokens("good.npy", [40])
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "odd.npy").write_bytes(good.read_bytes()[:-1])
    np.save(tmp_path / "header.npy", np.arange(40, dtype=np.uint16))
    high = np.full(40, 999, np.uint16)
    high[30] = 1000
    high.tofile(tmp_path / "high.npy")
    for path, message in (
        ("none.npy", r"none\.npy: no such token file"),
        ("x*.npy", r"x\*\.npy: no file matches"),
        (".", "is a folder"),
        ("empty.npy", r"empty\.npy: empty token file"),
        ("odd.npy", r"odd\.npy: 79 bytes is not a multiple of 2 .*truncated after token 39"),
        ("header.npy", r"header\.npy: has a numpy header"),
        ("high.npy", r"high\.npy: token 1000 at token offset 30 is outside the vocabulary of 1000"),
    ):
        with pytest.raises(UserError, match=message) as error:
            open_(tmp_path / path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="needs 64 tokens, but the longest of 1 token files"):
        open_(good, sequence_length=64)
    with pytest.raises(UserError, match="eos_token_id 1000 is outside"):
        open_(good, eos_token_id=1000)


def test_the_wrong_type_is_caught_at_open(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 1000, 4000)
    tokens.astype(np.uint32).tofile(tmp_path / "a.npy")
    open_(tmp_path / "a.npy", dtype="uint32")
    # uint32 read as uint16 alternates with zeros and stays in range; the other way round does not.
    tokens.astype(np.uint16).tofile(tmp_path / "b.npy")
    with pytest.raises(UserError, match=r"b\.npy: token \d+ at token offset 0 .*wrong dtype"):
        open_(tmp_path / "b.npy", dtype="uint32")


def test_a_truncated_file_is_told_by_its_documents(write_tokens):
    file = write_tokens("a.npy", [40, 60])
    file.write_bytes(file.read_bytes()[:160])
    with pytest.raises(UserError, match=r"a\.npy: truncated: .* 80 tokens, .* at token 100"):
        open_(file)


def test_bad_document_files(tmp_path, write_tokens):
    for text, message in (
        ("0,5,a,b\n", "row 1 is not start,end,id,src,loc"),
        ("0,5,a,b,1\n3,9,c,d,2\n", "overlaps"),
    ):
        (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text.encode()))
        with pytest.raises(UserError, match=message):
            read_documents(str(tmp_path / "a.csv.gz"))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"0,5,a,b,1\n" * 99)[:-12])
    with pytest.raises(UserError, match="not a readable"):
        read_documents(str(tmp_path / "a.csv.gz"))
    file = write_tokens("b.npy", [40])
    file.with_suffix(".csv.gz").unlink()
    with pytest.raises(UserError, match="its documents are unknown"):
        open_(file, instances="packed")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"paths": ("a",), "sources": {"x": ("b",)}, "weights": {"x": 1}}, "not both"),
        ({"sources": {"x": ("b",)}}, "without a weight: x"),
        ({"sources": {"x": ("b",)}, "weights": {"x": 1, "y": 2}}, "unknown sources: y"),
        ({"sources": {"x": ("b",)}, "weights": {"x": 0}}, "positive numbers: x"),
        ({"paths": ("a",), "batch_size_schedule": ((5, 2), (3, 4))}, "rising order"),
        ({"paths": ("a",), "max_target_sequence_length": 6000}, "must be a multiple"),
        ({"paths": ("a",), "ordr": "olmo"}, "ordr"),
    ],
)
def test_mistakes_in_the_configuration(settings, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**settings)


def test_a_recipe_without_data_is_refused_when_it_is_opened():
    with pytest.raises(UserError, match=r"no data: give Data\.paths"):
        open_dataset(DataConfig(), 100)
