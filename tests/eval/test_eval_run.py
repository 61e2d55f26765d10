"""Evaluation end to end: equal to transformers, resumed to the same file, read by people."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

import olmo_jax
import olmo_jax.cli as cli
from olmo_jax.convert.load import load_tokenizer
from olmo_jax.errors import UserError
from olmo_jax.eval.run import evaluate
from olmo_jax.eval.scoring import Scorer
from olmo_jax.eval.tasks import load_task

ROOT = Path(__file__).parents[2]
TASKS = [
    "arc_easy",
    "hellaswag_rc_5shot",
    "piqa",
    "boolq",
    "mmlu_stem_mc_5shot",  # astronomy
    "lambada_bpb_0shot",
]
LIMIT = 4


@pytest.mark.parametrize("kind", ["olmo2", "pythia"])
def test_log_likelihoods_are_those_of_transformers(kind, hf_model):
    import torch

    folder, model = hf_model(kind)
    tokenizer, eos_id = load_tokenizer(folder)
    found = evaluate(olmo_jax.load(folder), tokenizer, TASKS, name=kind, limit=LIMIT, eos_id=eos_id)
    for label in TASKS:
        items = found.content["tasks"][label]["items"]
        questions = load_task(label, LIMIT).questions
        assert len(items) == len(questions) == LIMIT
        for item, question in zip(items, questions, strict=True):
            asked = zip(question.contexts, question.continuations, strict=True)
            for (context, continuation), logprob in zip(asked, item["logprobs"], strict=True):
                answer = tokenizer.encode(continuation).ids
                ids = (tokenizer.encode(context).ids + answer)[-257:]
                with torch.no_grad():
                    logits = model(torch.tensor([ids[:-1]])).logits[0, -len(answer) :]
                expected = torch.log_softmax(logits.float(), -1)[
                    torch.arange(len(answer)), torch.tensor(answer)
                ].sum()
                assert logprob == pytest.approx(float(expected), abs=1e-4, rel=1e-5)


def test_a_killed_evaluation_goes_on_to_the_same_file(tmp_path, hf_model):
    folder, _ = hf_model("olmo2")
    tokenizer, eos_id = load_tokenizer(folder)
    model = olmo_jax.load(folder)
    scorer = Scorer(model, tokens_per_batch=1024)
    names = ["arc_easy", "piqa:pmi_dc", "arc_easy:bpb"]
    seen = []

    def run(out, progress=None):
        evaluate(
            model, tokenizer, names, name="it", out=tmp_path / out, eos_id=eos_id, limit=40,
            progress=progress, scorer=scorer,
        )  # fmt: skip

    def kill(done, total):
        seen.append((done, total))
        if len(seen) == 2:
            raise KeyboardInterrupt

    run("whole.json")
    with pytest.raises(KeyboardInterrupt):
        run("killed.json", kill)
    assert not (tmp_path / "killed.json").exists()
    part = tmp_path / "killed.json.part"
    part.write_bytes(part.read_bytes()[:-20])  # a line cut short
    kept, first = part.read_bytes().count(b"\n"), seen[1][0]
    assert kept > 1
    seen.clear()
    run("killed.json", lambda done, total: seen.append((done, total)))
    assert seen[0][0] > first // 2 and seen[-1][0] == seen[-1][1]
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not part.exists()

    # A part of other requests is not taken.
    part.write_text('{"of": "another"}\n[0, 1.0, true, [1.0]]\n')
    run("killed.json")
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()

    content = json.loads((tmp_path / "whole.json").read_text())
    task = content["tasks"]["arc_easy"]
    assert len(task["items"]) == 40
    answers = [item["choice"] == item["label"] for item in task["items"]]
    assert task["metrics"]["acc"] == np.mean(answers)
    assert task["stderr"] == pytest.approx(np.std(answers, ddof=1) / 40**0.5)
    assert "plain_logprobs" in content["tasks"]["piqa:pmi_dc"]["items"][0]
    page = (tmp_path / "whole.html").read_text()
    assert "arc_easy:bpb" in page and f"{task['metrics']['acc']:.4f}" in page
    assert "http://" not in page and "https://" not in page


@pytest.mark.slow
def test_a_command_that_is_killed_ends_with_the_same_file(tmp_path, hf_model):
    folder, _ = hf_model("olmo2")

    def start(out):
        command = [
            "eval",
            str(folder),
            "--tasks=arc_easy,winogrande,boolq",
            f"--out={tmp_path / out}",
        ]
        return subprocess.Popen(
            [sys.executable, "-m", "olmo_jax.cli", *command, "--limit=100"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    assert start("whole.json").wait() == 0
    part, killed = tmp_path / "r.json.part", start("r.json")
    while killed.poll() is None and (not part.exists() or part.stat().st_size < 10_000):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and part.exists()
    assert start("r.json").wait() == 0
    assert (tmp_path / "r.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_the_command(tmp_path, hf_model, capsys):
    folder, _ = hf_model("olmo2")
    out = tmp_path / "r.json"
    command = ["eval", str(folder), "--tasks=boolq,arc_easy_rc_0shot:bpb", "--limit=2"]
    assert cli.run([*command, f"--out={out}"]) == 0
    text = capsys.readouterr().out
    assert "boolq" in text and "arc_easy_rc_0shot:bpb" in text and "written" in text
    assert list(json.loads(out.read_text())["tasks"]) == ["boolq", "arc_easy_rc_0shot:bpb"]
    suite = ["eval", str(folder), "--tasks=olmo1_core8:bpb", "--limit=1", f"--out={out}"]
    assert cli.run(suite) == 0
    content = json.loads(out.read_text())
    values = [task["metrics"]["bpb"] for task in content["tasks"].values()]
    assert len(values) == 8 and content["suites"] == {"olmo1_core8:bpb": np.mean(values)}
    capsys.readouterr()
    assert cli.run(["eval", "--list"]) == 0
    text = capsys.readouterr().out
    assert "olmes_core9_rc" in text and "mt_mbpp_rust_gold_bpb_3shot" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks=arc_esy"], "did you mean arc_easy"),
        ([], "give one of --tasks"),
        (["--tasks=piqa", "--out=results.txt"], "ends in .json"),
        (["--tasks=piqa", "--limit=0"], "at least 1"),
        (["--tasks=,"], "no task is given"),
        (["--tasks=piqa", "--num_fewshot=1"], "--tasks takes no --num_fewshot"),
        (["--tasks=piqa", "--harness=piqa"], "--tasks and --harness: give one"),
        (["--domains=x.jsonl", "--limit=3"], "--domains takes no --limit"),
        (["--domains=x.jsonl", "--out=results.txt"], "ends in .json"),
        (["--domains=no_such.jsonl"], "no_such.jsonl: no such documents file"),
        (["--harness="], "no task is given"),
        (["--harness=,"], "no task is given"),
        (["--harness=piqa", "--limit=0"], "at least 1"),
        (["--harness=piqa", "--as_published"], "--harness takes no --as_published"),
        (["--compare", "--step=1"], "--compare takes no --step"),
    ],
)
def test_bad_input_is_one_line_before_weights_are_read(
    arguments, words, hf_model, capsys, monkeypatch
):
    monkeypatch.setattr("olmo_jax.convert.load.load", Mock(side_effect=AssertionError))
    folder, _ = hf_model("olmo2")
    capsys.readouterr()
    assert cli.run(["eval", str(folder), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


def test_an_answer_longer_than_the_model_reads(hf_model):
    folder, _ = hf_model("olmo2")
    tokenizer, eos_id = load_tokenizer(folder)
    with pytest.raises(UserError, match=r"gsm8k_gold_bpb_5shot: an answer of .* context of 256"):
        evaluate(
            olmo_jax.load(folder), tokenizer, ["gsm8k_gold_bpb_5shot"], name="it", eos_id=eos_id
        )
