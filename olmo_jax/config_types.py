"""Types of configuration fields: strict checks of values, and each type in words for messages.

No gin here and no fields' names; `config` has both.
"""

from pprint import pformat
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


def checked(value: Any, hint: Any) -> Any:
    """The value as a field's type, strictly: no text for a number, no number for a bool.

    Lists become tuples; a float without a fraction (5e12) becomes an int where one is asked for.
    Raises ValueError without a message; `allowed` has the words.
    """
    adapter = TypeAdapter(hint, config=_STRICT)
    for whole in (False, True):
        try:
            return adapter.validate_python(_tuples(value, whole))
        except ValidationError:
            continue
    raise ValueError


def allowed(hint: Any) -> str:
    """A type in words: "a whole number or None"."""
    words = {int: "a whole number", float: "a finite number", bool: "True or False"}
    words |= {str: 'text in quotes ("…")', NoneType: "None"}
    origin, args = get_origin(hint), get_args(hint)
    if hint in words:
        return words[hint]
    if origin is Literal:
        return " or ".join(pformat(choice).replace("'", '"') for choice in args)
    if origin in (Union, UnionType):
        return " or ".join(allowed(choice) for choice in args)
    if origin is tuple and args[-1] is Ellipsis:
        return f"a tuple (…,), each {allowed(args[0])}"
    if origin is tuple:
        return f"a tuple of {len(args)}, each {allowed(args[0])}"
    return f"a dict {{name: value}}, each value {allowed(args[-1])}"


def choices(hint: Any) -> list[str]:
    """The texts that a type names one by one."""
    if get_origin(hint) is Literal:
        return [choice for choice in get_args(hint) if isinstance(choice, str)]
    return [c for arg in get_args(hint) if get_origin(hint) is not tuple for c in choices(arg)]


def _tuples(value: Any, whole: bool) -> Any:
    """Lists as tuples, all the way down; with `whole`, floats without a fraction as ints."""
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(v, whole) for v in value)
    if isinstance(value, dict):
        return {k: _tuples(v, whole) for k, v in value.items()}
    return int(value) if whole and isinstance(value, float) and value.is_integer() else value
