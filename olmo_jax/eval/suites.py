"""Named sets of tasks: what papers report, and what the released runs measured as they trained.

The in-loop sets are those of the published configurations (allenai/OLMo's configs/official and
configs/official-1124, allenai/OLMo-core's scripts/official and its task groups).
"""

_MMLU = ("stem", "humanities", "social_sciences", "other")
_CORE9 = (
    "arc_challenge",
    "arc_easy",
    "boolq",
    "csqa",
    "hellaswag",
    "openbookqa",
    "piqa",
    "socialiqa",
    "winogrande",
)
_SKILLS = tuple(
    f"basic_skills_{name}_rc_5shot"
    for name in (
        "arithmetic",
        "coding",
        "common_knowledge",
        "logical_reasoning",
        "pattern",
        "string_operations",
    )
)
_OLMO1_LOOP = ("piqa", "hellaswag", "winogrande", "openbook_qa", "sciq", "arc_easy", "copa", "rte")
_OLMO2_LOOP = (
    *("piqa", "hellaswag", "winogrande", "openbook_qa", "boolq", "sciq", "arc_easy"),
    *("arc_challenge", "copa", "commonsense_qa", "social_iqa"),
)


def _mmlu(kind: str) -> tuple[str, ...]:
    return tuple(f"mmlu_{category}{kind}" for category in _MMLU)


SUITES: dict[str, tuple[str, ...]] = {
    "olmo1_core8": (
        "arc_challenge",
        "arc_easy",
        "boolq",
        "hellaswag",
        "openbook_qa",
        "piqa",
        "sciq",
        "winogrande",
    ),
    "olmes_core9_rc": tuple(f"{name}_rc_5shot" for name in _CORE9),
    "olmes_core9_mc": tuple(f"{name}_mc_5shot" for name in _CORE9),
    "olmes_core9_bpb": tuple(f"{name}_rc_5shot_bpb" for name in _CORE9),
    "mmlu": _mmlu(""),
    "mmlu_rc_5shot": _mmlu("_val_rc_5shot"),
    "mmlu_rc_5shot_test": _mmlu("_test_rc_5shot"),
    "mmlu_mc_5shot": _mmlu("_mc_5shot"),
    "mmlu_mc_5shot_test": _mmlu("_mc_5shot_test"),
    "mmlu_bpb_5shot_test": _mmlu("_test_bpb_5shot"),
    "basic_skills": _SKILLS,
    "olmo1_in_loop": (*_OLMO1_LOOP, "commitment_bank", "mrpc", "sst2"),
    "olmo2_in_loop": (
        *_OLMO2_LOOP,
        *_mmlu("_var"),
        *_mmlu("_mc_5shot"),
        *_mmlu("_mc_5shot_test"),
        "basic_arithmetic",
        "trivia_qa_wiki_ppl",
        "natural_qs_open_ppl",
        "arc_easy_ppl",
    ),
    "olmo2_32b_in_loop": (
        *_mmlu("_mc_5shot"),
        *_mmlu("_mc_5shot_test"),
        "arc_challenge_test_rc_5shot",
        "arc_easy_test_rc_5shot",
        "csqa_val_rc_5shot",
        "hellaswag_val_rc_5shot",
        "openbookqa_test_rc_5shot",
        "piqa_val_rc_5shot",
        "socialiqa_val_rc_5shot",
    ),
    "olmo3_in_loop": (
        "arc_challenge_test_bpb_5shot",
        "arc_challenge_test_mc_5shot_fast",
        "arc_easy_test_bpb_5shot",
        "arc_easy_test_mc_5shot_fast",
        "hellaswag_bpb_5shot",
        *_mmlu("_test_bpb_5shot"),
        *_mmlu("_test_mc_5shot_fast"),
        *_SKILLS,
        "codex_humaneval_gold_bpb_3shot",
        "codex_mbpp_gold_bpb_3shot",
        "minerva_math_500_gold_bpb_0shot",
        "mt_mbpp_cpp_gold_bpb_3shot",
        "mt_mbpp_java_gold_bpb_3shot",
        "mt_mbpp_rust_gold_bpb_3shot",
        "copycolors_10way_fast",
    ),
}
