"""Makes tests/curate/fixtures/dolma.json.xz: what dolma 1.2.1 makes of real and awkward documents.

    python3.11 -m venv dolma && . dolma/bin/activate && pip install -U pip
    pip install --no-deps dolma==1.2.1
    pip install 'numpy<2' anyascii boto3 charset-normalizer fasttext-wheel fsspec jq msgspec \
        necessary nltk omegaconf platformdirs pycld2 python-dotenv pyyaml requests rich smart-open \
        tokenizers tqdm uniseg zstandard
    PYTHONPATH=launch python tests/oracles/make_dolma.py

Documents are scenes of the plays (launch/demo_text.py), cut short, and a few that try the rules.
Beside them are the attributes that its taggers give, their number and sum as its `stat` has them,
what its mixer writes and what its deduper marks, each with the configuration.
"""

import gzip
import json
import lzma
import re
import tempfile
from pathlib import Path

from demo_text import read_plays
from dolma import deduper, mixer
from dolma.core.analyzer import create_and_run_analyzer
from dolma.core.runtime import create_and_run_tagger

OUT = Path(__file__).parents[1] / "curate" / "fixtures" / "dolma.json.xz"
TAGGERS = [
    "gopher_v1",
    "gopher_v2",
    "c4_v1",
    "c4_v2",
    "pii_regex_v2",
    "pii_regex_with_counts_fast_v2",
    "bytes_length_v1",
    "doc_count_v1",
    "char_length_v1",
    "char_length_strip_ws_v1",
    "char_length_with_paragraphs_v1",
    "whitespace_tokenizer_v1",
    "whitespace_tokenizer_with_paragraphs_v1",
    "uniseg_length_v1",
    "uniseg_length_paragraphs_v1",
    "uniseg_length_paragraphs_with_empty_v1",
    "uniseg_length_paragraphs_with_doc_length_v1",
    "paragraph_repetitions_v1",
    "cld2_en_doc_v2",
    "cld2_en_paragraph_with_doc_score_v2",
]
AWKWARD = [
    "",
    " \n ",
    "one",
    "Write to a.b@c.org, or x@y.z \nor (555) 123-4567 \nor call\n 555.123.4567 \n10.0.0.1 here. ",
    "isbn 123 456 7890 \n#8.8.8.8\n doi 8.8.4.4\n mail:\n  (x@y.z \n@a@b.c \n me@localhost \n",
    "\n\n* a bullet\n- another\n…\nends with…\n\n\n* a bullet\nlorem ipsum { javascript }\nİst.",
    "Javascript javascripts ½ ² 12 word_ ___ éa # no#\u2028line\u0085next a\u00a0b\n" * 3,
    "ab ab ab ab ab ab\nxyxyxyxyxy\n- - - - - - - - - - - -\n",
    "Der schnelle braune Fuchs springt über den faulen Hund.\nDas ist ein Satz. 漢字 🙂\n",
    "'On pain of losing her tongue.' Who? don\u2019t \u2018tis l'objectif 1'on\n",
    "control \x07 characters \x00 in an English sentence that is long enough to be sure about.\n",
    "the same words the same words the same words the same words the same words the same words",
]
MIX = {
    "name": "mixed",
    "attributes": ["dolma"],
    "filter": {
        "include": [
            "$.attributes[?(@.dolma__gopher_v1__word_count[0][2] >= 8 && "
            "@.dolma__gopher_v1__word_count[0][2] < 400)]",
            "$@.attributes[?(@.dolma__pii_regex_v2__EMAIL_ADDRESS)]",
        ],
        "exclude": ["$.attributes[?(@.dolma__gopher_v1__fraction_of_duplicate_lines[0][2] > 0.4)]"],
    },
    "span_replacement": [
        {
            "span": "$.attributes.dolma__pii_regex_with_counts_fast_v2__EMAIL_ADDRESS",
            "min_score": 0.5,
            "replacement": " |||EMAIL_ADDRESS||| ",
        },
        {
            "span": "$.attributes.dolma__char_length_with_paragraphs_v1__paragraph",
            "min_score": 3,
            "max_score": 30,
            "replacement": "<{}>",
        },
    ],
    "output": {
        "max_size_in_bytes": 1 << 30,
        "discard_fields": ["attributes"],
        "min_text_length": 100,
    },
}
JQ = {
    **MIX,
    "name": "jq",
    "span_replacement": [],
    "filter": {
        "syntax": "jq",
        "include": [".attributes.dolma__gopher_v1__word_count[0][2] > 300", '.id == "awkward-2"'],
        "exclude": ['.attributes | has("dolma__c4_v2__has_naughty_word")'],
    },
}
NGRAM = {"ngram_length": 6, "stride": 3, "overlap_threshold": 0.4, "skip_short_paragraphs": False}
DEDUPE = {
    "by_text": {"documents": {"attribute_name": "seen", "key": "$.text"}},
    "by_url": {"documents": {"attribute_name": "seen", "key": "$.metadata.url"}},
    "by_paragraph": {"paragraphs": {"attribute_name": "seen"}},
    "by_ngram": {"paragraphs": {"attribute_name": "seen", "by_ngram": NGRAM}},
}


def documents() -> list[dict]:
    """Two files' worth, in order."""
    rows = [
        {"id": f"awkward-{i}", "text": text, "source": "made", "metadata": {"url": f"http://{i}"}}
        for i, text in enumerate(AWKWARD)
    ]
    for name, text in list(read_plays().items())[::4]:
        for i, scene in enumerate(re.split(r"\n(?=### )", text)[1:5]):
            url = f"https://plays.example.org/{name}"
            row = {"id": f"{name}-{i}", "text": scene[: 700 + 400 * i], "source": "plays"}
            rows.append({**row, "metadata": {"url": url}})
    return [*rows, {**rows[-1], "id": "again"}]


def attributes(folder: Path) -> list[dict]:
    lines = [line for name in "ab" for line in (folder / f"{name}.jsonl").read_text().split("\n")]
    return [json.loads(line)["attributes"] for line in lines if line]


def main() -> None:
    rows = documents()
    with tempfile.TemporaryDirectory() as folder:
        (root := Path(folder, "documents")).mkdir()
        files = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        for name, part in zip("ab", files, strict=True):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
            (root / f"{name}.jsonl").write_text("".join(lines))
        pattern = f"{root}/*.jsonl"
        work = {"input": f"{folder}/in", "output": f"{folder}/out"}
        create_and_run_tagger([pattern], TAGGERS, experiment="dolma", num_processes=1)
        report = f"{folder}/report"
        create_and_run_analyzer([f"{folder}/attributes/dolma/*"], report=report, num_bins=20)
        with gzip.open(f"{report}/summaries.jsonl.gz") as lines:
            summaries = {row.pop("name"): row for row in map(json.loads, lines)}
        stat = {name: [row["total"], row["sum"]] for name, row in sorted(summaries.items())}
        mixed = {}
        for stream in (MIX, JQ):
            out = {**stream["output"], "path": f"{folder}/mixed"}
            config = {**stream, "documents": [pattern], "output": out}
            mixer({"streams": [config], "processes": 1, "work_dir": work, "shuffle": True})
            with gzip.open(f"{folder}/mixed/{stream['name']}-0000.json.gz") as lines:
                mixed[stream["name"]] = [json.loads(line) for line in lines]
        bloom = {"estimated_doc_count": 10**5, "desired_false_positive_rate": 1e-8}
        for name, dedupe in DEDUPE.items():
            bloom |= {"file": f"{folder}/{name}.bin", "read_only": False, "size_in_bytes": 0}
            dedupe = {"name": name, "skip_empty": True, "min_length": 0, "min_words": 0, **dedupe}
            config = {"documents": [pattern], "dedupe": dedupe, "bloom_filter": bloom}
            deduper({**config, "processes": 1, "work_dir": work})
        read = {name: attributes(Path(folder, "attributes", name)) for name in ("dolma", *DEDUPE)}
    content = {
        "taggers": TAGGERS,
        "files": files,
        "attributes": read.pop("dolma"),
        "stat": stat,
        "mix": [{"stream": stream, "rows": mixed[stream["name"]]} for stream in (MIX, JQ)],
        "dedupe": {name: {"dedupe": DEDUPE[name], "attributes": read[name]} for name in DEDUPE},
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_bytes(lzma.compress(json.dumps(content).encode(), preset=9))
    print(f"{OUT}: {OUT.stat().st_size:,} bytes, {len(rows)} documents")


if __name__ == "__main__":
    main()
