"""What the tests plant among real documents: a second edition of a play, questions in disguise."""

import re

_SPELLING = [
    (r"(?<=[a-z])'d\b", "ed"),
    (r"\b([Tt])o-(night|morrow|day)\b", r"\1o\2"),
    (r"\b(hon|fav|lab|col|hum|val|rum|neighb|ard|behavi|harb)our", r"\1or"),
    (r"\b([Oo])'er\b", r"\1ver"),
    (r"\b([Nn]e|[Ee])'er\b", r"\1ver"),
    (r"\bta'en\b", "taken"),
    (r"\bmurther", "murder"),
    (r"\bi' the\b", "in the"),
    (r"\bth'", "the "),
    (r"'em\b", "them"),
    (r"\bshew", "show"),
    (r"\bspake\b", "spoke"),
    (r"\bgaol", "jail"),
]


def second_edition(play):
    """A play in Markdown as another house prints it: no stage directions, modern spelling, fewer
    kinds of punctuation, names of speakers not in capitals, speeches in one line."""
    text = re.sub(r"^_.*_\s*$", "", play, flags=re.MULTILINE)
    text = re.sub(r" ?_[^_\n]*_", "", text)
    text = re.sub(r"\*\*(.+?)\*\*\s*\n", lambda name: f"{name[1].capitalize()}. ", text)
    for old, new in _SPELLING:
        text = re.sub(old, new, text)
    text = re.sub(r"[:;]", ",", text).replace("--", " —").replace("!", ".")
    return re.sub(r" *\n(?=\S)", " ", text)


def disguised(question, i):
    """A question as it may stand in a web page: in capitals, in small letters, over lines, without
    its punctuation."""
    forms = (
        str.upper,
        str.lower,
        lambda text: text.replace(" ", "\n", 3),
        lambda text: re.sub(r"[^\w\s]", " ", text),
    )
    return forms[i % len(forms)](question)
