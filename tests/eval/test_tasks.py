"""The wheel's tasks: all there, as questions that make sense, by their own names and ours."""

import pytest

from olmo_jax.errors import UserError
from olmo_jax.eval.suites import SUITES
from olmo_jax.eval.tasks import expand, labels, load_task, metric_of


def test_the_wheel_has_252_tasks_and_every_suite_is_of_them():
    assert len(labels()) == 252
    kinds = [kind for kind, _ in labels().values()]
    assert kinds.count("OEEvalTask") == 158 and kinds.count("MMLU") == 75
    assert {label for members in SUITES.values() for label in members} <= set(labels())
    assert all(metric_of(label) for label in labels())


@pytest.mark.slow
@pytest.mark.parametrize("label", list(labels()))
def test_every_task_has_questions(label):
    task = load_task(label)
    assert len(task.questions) >= 56  # the smallest is CommitmentBank
    for q in task.questions:
        assert len(q.contexts) == len(q.continuations) > q.label >= 0
        assert all(q.continuations)
    if task.metric in ("bpb", "ce_loss"):
        assert all(len(q.continuations) == 1 for q in task.questions)


def test_a_question_of_each_form():
    rc = load_task("arc_easy_rc_0shot", 1).questions[0]
    old = load_task("arc_easy", 1).questions[0]
    assert rc.contexts[0].endswith("\nAnswer:") and len(rc.continuations) == 4
    assert old.contexts[0] == "Question: Which technology was developed most recently?\nAnswer:"
    assert old.continuations[old.label] == " cellular telephone"
    mc = load_task("mmlu_stem_mc_5shot", 1).questions[0]
    assert mc.continuations == (" A", " B", " C", " D")
    assert mc.contexts[0].startswith("The following are multiple choice questions (with answers)")
    assert mc.contexts[0].count("Answer:") == 6
    bpb = load_task("arc_easy_rc_0shot:bpb", 1).questions[0]
    assert bpb.continuations == rc.continuations[rc.label : rc.label + 1] and bpb.label == 0
    winogrande = load_task("winogrande", 1).questions[0]
    assert winogrande.contexts[0] != winogrande.contexts[1]
    assert winogrande.continuations[0] == winogrande.continuations[1]


def test_another_metric_takes_the_requests_without_their_question():
    task = load_task("arc_challenge_rc_5shot:pmi_dc", 3)
    assert task.metric == "pmi_dc" and len(task.questions) == 3
    assert all(q.plain_contexts == ("Answer:",) * len(q.contexts) for q in task.questions)
    assert load_task("arc_challenge_rc_5shot").metric == "len_norm"


def test_names():
    assert expand(["piqa", "olmo1_core8", "piqa:bpb"]) == [
        "piqa",
        *(label for label in SUITES["olmo1_core8"] if label != "piqa"),
        "piqa:bpb",
    ]
    assert expand(["olmo1_core8:bpb"]) == [f"{label}:bpb" for label in SUITES["olmo1_core8"]]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["arc_esy"], "there is no task 'arc_esy': did you mean arc_easy"),
        (["olmo1_core"], "did you mean olmo1_core8"),
        (["piqa:f2"], "no metric 'f2'"),
        (["olmo1_core8:f2"], "no metric 'f2'"),
        ([], "no task is given"),
    ],
)
def test_names_that_are_refused(names, words):
    with pytest.raises(UserError, match=words):
        expand(names)


def test_metrics_that_a_task_cannot_give():
    with pytest.raises(UserError, match="only the right answers"):
        load_task("codex_mbpp_gold_bpb_3shot:acc")
    with pytest.raises(UserError, match="which pmi_dc needs"):
        load_task("arc_easy_mc_5shot:pmi_dc")
