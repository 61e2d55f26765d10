"""What is planted among 38 plays is found, and how much of it: recall and precision are printed."""

import json
import random
import re
import runpy
from pathlib import Path

import pytest
from planted import disguised, second_edition

from olmo_jax.cli import run
from olmo_jax.curate.config import parse_config
from olmo_jax.curate.dedupe import dedupe
from olmo_jax.curate.dedupe_config import DeduperConfig
from olmo_jax.curate.executor import Executor

ROOT = Path(__file__).parents[2]
TASK = "arc_easy_rc_0shot"


@pytest.fixture(scope="module")
def scenes():
    """Name to text of the scenes of 38 plays that have 50 words and more."""
    plays = runpy.run_path(str(ROOT / "launch/demo_text.py"))["read_plays"]()
    found = {}
    for name, play in plays.items():
        pieces = re.split(r"^(?=### )", play, flags=re.MULTILINE)
        found |= {f"{name}-{i}": text for i, text in enumerate(pieces)}
    return {name: text for name, text in found.items() if len(text.split()) >= 50}


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"id": name, "text": text}) + "\n" for name, text in rows.items()]
    path.write_text("".join(lines))


def attributes(folder, experiment):
    files = (folder / "attributes" / experiment).glob("*.jsonl")
    rows = [json.loads(line) for f in files if "clusters" not in f.name for line in f.open()]
    return {row["id"]: row["attributes"] for row in rows}


def told(what, found, planted):
    """Recall and precision, printed."""
    right = len(found & planted)
    recall, precision = right / len(planted), right / max(len(found), 1)
    print(f"{what}: recall {recall:.3f} of {len(planted)}, precision {precision:.3f}")
    return recall, precision


def jaccard(a, b, n=5):
    """The true similarity, of which MinHash knows an estimate."""
    both = [re.findall(r"\w+", text.lower()) for text in (a, b)]
    a, b = ({tuple(w[k : k + n]) for k in range(len(w) - n + 1)} for w in both)
    return len(a & b) / len(a | b)


@pytest.mark.slow  # fetches the plays
def test_second_editions_are_found(scenes, tmp_path):
    planted = {f"{name} again": second_edition(text) for name, text in list(scenes.items())[::4]}
    write(tmp_path / "documents/a.jsonl", scenes)
    write(tmp_path / "documents/b.jsonl", planted)
    config = {
        "documents": [f"{tmp_path}/documents/*"],
        "dedupe": {
            "name": "near",
            "method": "minhash",
            "documents": {"attribute_name": "near", "key": "$.text"},
        },
    }
    dedupe(parse_config(config, DeduperConfig, ""), Executor(workers=2), quiet=True)
    found = {name for name, marks in attributes(tmp_path, "near").items() if marks.get("near")}
    recall, precision = told("second editions of scenes", found, set(planted))
    assert recall > 0.9 and precision > 0.99
    alike = {name for name in planted if jaccard(planted[name], scenes[name[:-6]]) >= 0.75}
    recall, _ = told("those of which 75 % of the 5-grams are equal", found & alike, alike)
    assert recall > 0.97 and len(alike) > len(planted) / 2
    clusters = [json.loads(x) for x in (tmp_path / "attributes/near/near.clusters.jsonl").open()]
    pairs = {tuple(d["id"] for d in cluster["documents"]) for cluster in clusters}
    assert {(name.removesuffix(" again"), name) for name in found & set(planted)} <= pairs
    assert all(0.6 < d["similarity"] <= 1 for c in clusters for d in c["documents"])
    where = clusters[0]["documents"][1]
    line = Path(where["file"]).read_text().splitlines()[where["line"] - 1]
    assert json.loads(line)["id"] == where["id"] and where["begins"][:20] in line


@pytest.mark.slow  # fetches the tasks
def test_questions_of_a_task_are_found(scenes, tmp_path):
    from olmo_jax.eval.tasks import load_task

    random.seed(0)
    questions = [q.contexts[0].split("\n")[0][10:] for q in load_task(TASK).questions]
    long = [question for question in questions if len(re.findall(r"\w+", question)) >= 8]
    planted, documents = set(), {}
    for i, (name, text) in enumerate(scenes.items()):
        if i % 4 == 0:
            at = text.index("\n", random.randrange(len(text) // 2))
            text = f"{text[:at]}\n{disguised(random.choice(long), i // 4)}{text[at:]}"
            planted.add(name)
        documents[name] = text
    write(tmp_path / "documents/a.jsonl", documents)
    index = f"--index={tmp_path}/index.npz"
    assert run(["data", "decontaminate", f"{tmp_path}/documents/*", f"--tasks={TASK}", index]) == 0
    found = {
        name
        for name, marks in attributes(tmp_path, "contamination").items()
        if "contamination__ngram_overlap__contaminated" in marks
    }
    recall, precision = told(f"questions of {TASK}", found, planted)
    print(f"{len(questions) - len(long)} of {len(questions)} have less than 8 words")
    assert recall == 1 and precision > 0.99
