"""Expressions about a document: JSONPath (a subset, read by the parser below into functions; there
is no eval) and jq (the library). They are what Dolma's mixer takes.

JSONPath: `$.a.b`, `['a']`, `[0]`, `[-1]`, `[*]`, and `[?(…)]` with `@.path`, `$.path`, numbers,
'strings', true, false, null, ==, !=, <, <=, >, >=, &&, ||, ! and brackets. A filter on an object
asks about the object itself, as the library that Dolma uses has it.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from olmo_jax.curate.documents import encode
from olmo_jax.errors import UserError

Select = Callable[[dict[str, Any]], list[Any]]
"""A document to the values that an expression finds."""
_Step = Callable[[Any, Any], list[Any]]
_Test = Callable[[Any, Any], bool]

_TOKEN = re.compile(
    r"\s*(?:(?P<number>-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)|(?P<string>'[^']*'|\"[^\"]*\")"
    r"|(?P<name>[A-Za-z_][\w-]*)|(?P<sign>\$@|&&|\|\||==|!=|<=|>=|\[\?|[$@.\[\]()*!<>]))"
)
_CONSTANTS = {"true": True, "false": False, "null": None}
_NAMES = re.compile(r"\b\w+?__\w+__\w+\b")
_MEMBERS = re.compile(r"\battributes(?:\.|\[['\"])([A-Za-z_][\w-]*)")
_ASKED = re.compile(r"@(?:\.|\[['\"])([A-Za-z_][\w-]*)")


@lru_cache(maxsize=256)
def compile_expression(text: str, syntax: str) -> Select:
    """An expression in the syntax `jsonpath` or `jq`. Raises UserError with the place of a
    mistake."""
    if syntax == "jsonpath":
        return _Parser(text).parse()
    if syntax == "jq":
        return _compile_jq(text)
    raise UserError(f"syntax {syntax!r}: is neither jsonpath nor jq")


class Filter:
    """Documents that match one of `include` (all, when there are none), and none of `exclude`."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str], syntax: str):
        self._include = [compile_expression(text, syntax) for text in include]
        self._exclude = [(text, compile_expression(text, syntax)) for text in exclude]
        # A JSONPath matches when it finds anything; a jq program when all that it gives is true.
        self._is_match: Callable[[list[Any]], bool] = bool
        self._is_excluded: Callable[[list[Any]], bool] = bool
        if syntax == "jq":
            self._is_match = lambda found: bool(found) and all(map(bool, found))
            self._is_excluded = lambda found: any(map(bool, found))

    def why_not(self, document: dict[str, Any]) -> str | None:
        """What keeps a document out: the expression of `exclude`, or `include`; None when nothing
        does. Raises ValueError when a jq program fails on the document."""
        if self._include and not any(self._is_match(find(document)) for find in self._include):
            return "include"
        for text, find in self._exclude:
            if self._is_excluded(find(document)):
                return text
        return None


def attribute_names(expressions: Sequence[str]) -> set[str]:
    """The attributes that expressions name: `experiment__tagger__type` anywhere, and other names
    where they follow `attributes` or are asked for in a filter on it."""
    found: set[str] = set()
    for text in expressions:
        found.update(_NAMES.findall(text), _MEMBERS.findall(text))
        if "$.attributes[?" in text:
            found.update(_ASKED.findall(text))
    return found


def _compile_jq(text: str) -> Select:
    import jq

    try:
        program = jq.compile(text)
    except ValueError as e:
        raise UserError(f"filter {text!r}: {' '.join(str(e).split())}") from None
    return lambda document: program.input_text(encode(document).decode()).all()


class _Parser:
    """Recursive descent over the tokens of a JSONPath."""

    def __init__(self, text: str):
        self._text = text
        self._tokens: list[tuple[str, str, int]] = []
        at = 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if not match:
                raise self._error(at)
            self._tokens.append((match.lastgroup or "", match[match.lastgroup or 0], at))
            at = match.end()
        self._tokens.append(("end", "", len(text)))
        self._next = 0

    def parse(self) -> Select:
        if self._peek() not in ("$", "$@"):
            raise self._error(0)
        self._take()
        path = self._path()
        if self._tokens[self._next][0] != "end":
            raise self._error()
        return lambda document: path(document, document)

    def _path(self) -> _Step:
        steps: list[_Step] = []
        while (sign := self._peek()) in (".", "[", "[?"):
            self._take()
            if sign == "[?":
                self._expect("(")
                steps.append(_where(self._either()))
                self._expect(")")
                self._expect("]")
            elif sign == ".":
                steps.append(self._member())
            else:
                steps.append(self._index())
                self._expect("]")
        return _chain(steps)

    def _member(self) -> _Step:
        kind, value = self._take()
        if value == "*":
            return _all_values
        if kind != "name":
            raise self._error(self._tokens[self._next - 1][2])
        return _key(value)

    def _index(self) -> _Step:
        kind, value = self._take()
        if value == "*":
            return _all_values
        if kind == "string":
            return _key(value[1:-1])
        if kind == "number" and re.fullmatch(r"-?\d+", value):
            return _item(int(value))
        raise self._error(self._tokens[self._next - 1][2])

    def _either(self) -> _Test:
        test = self._both()
        while self._peek() == "||":
            self._take()
            test = _or(test, self._both())
        return test

    def _both(self) -> _Test:
        test = self._not()
        while self._peek() == "&&":
            self._take()
            test = _and(test, self._not())
        return test

    def _not(self) -> _Test:
        if self._peek() == "!":
            self._take()
            inner = self._not()
            return lambda here, root: not inner(here, root)
        if self._peek() == "(":
            self._take()
            inner = self._either()
            self._expect(")")
            return inner
        left = self._operand()
        if self._peek() in _COMPARE:
            compare = _COMPARE[self._take()[1]]
            right = self._operand()
            return lambda here, root: compare(left(here, root), right(here, root))
        return lambda here, root: bool(left(here, root))

    def _operand(self) -> _Step:
        at = self._tokens[self._next][2]
        kind, value = self._take()
        if value in ("@", "$"):
            path = self._path()
            return path if value == "@" else lambda here, root: path(root, root)
        if kind == "number":
            found: Any = float(value)
        elif kind == "string":
            found = value[1:-1]
        elif kind == "name" and value in _CONSTANTS:
            found = _CONSTANTS[value]
        else:
            raise self._error(at)
        return lambda here, root: [found]

    def _peek(self) -> str:
        return self._tokens[self._next][1] if self._tokens[self._next][0] == "sign" else ""

    def _take(self) -> tuple[str, str]:
        kind, value, _ = self._tokens[self._next]
        self._next = min(self._next + 1, len(self._tokens) - 1)
        return kind, value

    def _expect(self, sign: str) -> None:
        if self._peek() != sign:
            raise self._error()
        self._take()

    def _error(self, at: int | None = None) -> UserError:
        at = self._tokens[self._next][2] if at is None else at
        return UserError(
            f"filter {self._text!r}: cannot be read from character {at + 1} "
            f"({self._text[at : at + 20]!r}); it must be a path such as $.attributes.a or "
            "$.attributes[?(@.a[0][2] >= 0.5 && @.b)]"
        )


def _chain(steps: list[_Step]) -> _Step:
    def run(here: Any, root: Any) -> list[Any]:
        values = [here]
        for step in steps:
            values = [found for value in values for found in step(value, root)]
        return values

    return run


def _key(name: str) -> _Step:
    return lambda here, root: [here[name]] if isinstance(here, dict) and name in here else []


def _item(i: int) -> _Step:
    return lambda here, root: (
        [here[i]] if isinstance(here, list | tuple) and -len(here) <= i < len(here) else []
    )


def _all_values(here: Any, root: Any) -> list[Any]:
    if isinstance(here, dict):
        return list(here.values())
    return list(here) if isinstance(here, list | tuple) else []


def _where(test: _Test) -> _Step:
    def run(here: Any, root: Any) -> list[Any]:
        candidates = here if isinstance(here, list | tuple) else [here]
        return [value for value in candidates if test(value, root)]

    return run


def _or(left: _Test, right: _Test) -> _Test:
    return lambda here, root: left(here, root) or right(here, root)


def _and(left: _Test, right: _Test) -> _Test:
    return lambda here, root: left(here, root) and right(here, root)


def _less(left: list[Any], right: list[Any]) -> bool:
    numbers = [v for v in (*left, *right) if isinstance(v, int | float)]
    return len(left) == len(right) == 1 and len(numbers) == 2 and left[0] < right[0]


_COMPARE: dict[str, Callable[[list[Any], list[Any]], bool]] = {
    "==": lambda left, right: left == right,
    "!=": lambda left, right: left != right,
    "<": _less,
    "<=": lambda left, right: _less(left, right) or left == right,
    ">": lambda left, right: _less(right, left),
    ">=": lambda left, right: _less(right, left) or left == right,
}
