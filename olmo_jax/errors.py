"""Mistakes that a person can mend: their exception, which the command line prints as one line.

Every room may import this file: it imports nothing of ours.
"""

from typing import Any


class UserError(Exception):
    """Bad input: the message says what was given, what is allowed, and what to do, in one line."""


def validation_faults(error: Any) -> list[str]:
    """A pydantic ValidationError in plain words, one line a fault, without its jargon and
    addresses; any other exception as its own words."""
    if not hasattr(error, "errors"):
        return [" ".join(str(error).split())]
    faults = error.errors(include_url=False)
    missing = [str(fault["loc"][0]) for fault in faults if fault["type"] == "missing"]
    lines = [f"{', '.join(missing)} not given"] if missing else []
    for fault in faults:
        field = ".".join(str(key) for key in fault["loc"][:1])
        message = fault["msg"].removeprefix("Value error, ").replace("Input should", "it must")
        if fault["type"] == "missing":
            continue
        elif fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            lines.append(f"{field} is no field")
        elif field:
            lines.append(f"{field} = {fault['input']!r}: {message}")
        else:
            lines.append(message)
    return lines
