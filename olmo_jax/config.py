"""gin at the door: gin files and bindings to a `RunConfig`, and back. Nothing imports this but cli.

The rest of the program has never heard of gin. gin parses and resolves macros and references; what
it gets wrong for frozen dataclasses (names, types, include paths, messages) is done here.
"""

import difflib
import importlib
import io
import re
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from pprint import pformat
from typing import Any, NamedTuple, get_type_hints

import gin
from gin.config_parser import (
    BindingStatement,
    BlockDeclaration,
    ConfigParser,
    ImportStatement,
    IncludeStatement,
)
from pydantic import ValidationError

from olmo_jax.config_types import allowed, checked, choices
from olmo_jax.errors import UserError, validation_faults
from olmo_jax.model.presets import PRESETS, preset
from olmo_jax.train.config import RunConfig

# gin name -> dataclass, in the order of the written configuration.
COMPONENTS: dict[str, Any] = {
    part.capitalize(): cls for part, cls in get_type_hints(RunConfig).items()
}
# gin name -> field -> type; `Model.preset` is a field of the door only.
_TYPES: dict[str, dict[str, Any]] = {name: get_type_hints(cls) for name, cls in COMPONENTS.items()}
_TYPES["Model"] = {"preset": str | None} | _TYPES["Model"]

# What gin hands out for a component: the bound values, with macros and references resolved. The
# dataclass itself is made outside gin, which would turn a ValidationError into a TypeError.
_VALUES = {
    name: gin.external_configurable(lambda **values: values, name=name, module="olmo_jax")
    for name in COMPONENTS
}


def load_config(
    gin_files: Sequence[str], bindings: Sequence[str] = (), allow_imports: bool = False
) -> RunConfig:
    """The run that gin files describe, each after the one before, and bindings after all of them.

    A binding is `Name.field=value` in gin's syntax; a value that gin cannot parse is text where the
    field takes text, so that a shell needs no double quotes. Raises UserError, one line a fault.
    """
    gin.clear_config()
    try:
        reader = _Reader(allow_imports)
        for path in gin_files:
            reader.read_file(_existing(path, [Path.cwd()], "--gin_file"))
        for binding in bindings:
            reader.read_binding(binding)
        reader.check_macros()
        values = {name: collect() for name, collect in _VALUES.items()}
        return _build(values, reader.where)
    except RecursionError:
        raise UserError("macros refer to one another in a circle, or brackets nest") from None
    finally:
        gin.clear_config()


def to_gin(run: RunConfig) -> str:
    """Every value of a run, defaults included, as gin; load_config gives an equal run from it."""
    lines = ["# The complete configuration of a run, defaults included."]
    for part, name in zip(fields(RunConfig), COMPONENTS, strict=True):
        lines.append("")
        config = getattr(run, part.name)
        for field in fields(config):
            value = pformat(getattr(config, field.name), width=88, sort_dicts=False)
            lines.append(f"{name}.{field.name} = {value}".replace("\n", "\n    "))
    return "\n".join(lines) + "\n"


# --- reading ------------------------------------------------------------------------------------


_COMMAND_LINE = "command line"  # in the place of a file's name
_CONSTANTS = {"true": "True", "false": "False", "none": "None", "null": "None"}


class _Unknown(NamedTuple):
    """A reference that gin does not know; refused where its binding's place is known."""

    name: str


class _Delegate(gin.config.ParserDelegate):
    def configurable_reference(self, scoped_selector, evaluate):
        try:
            return super().configurable_reference(scoped_selector, evaluate)
        except ValueError:
            return _Unknown(scoped_selector)


class _Reader:
    """Walks statements in order, refuses what is wrong, and binds the rest in gin."""

    def __init__(self, allow_imports: bool):
        self.allow_imports = allow_imports
        self.where: dict[tuple[str, str], str] = {}  # (component, field) -> where it was last bound
        self.open_files: list[Path] = []
        self.macros: dict[str, str] = {}  # name -> where it was given
        self.uses: dict[str, str] = {}  # macro name -> where it is used

    def read_file(self, path: Path) -> None:
        if path.resolve() in self.open_files:
            raise UserError(f"{path}: includes itself, by way of {self.open_files[-1].name}")
        self.open_files.append(path.resolve())
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as a gin file ({error})") from None
        for statement in _statements(text, str(path)):
            where = f"{path}:{statement.location.line_num}"
            if isinstance(statement, IncludeStatement):
                folders = [path.parent, Path.cwd()]
                self.read_file(_existing(statement.filename, folders, where))
            elif isinstance(statement, ImportStatement):
                self._import(statement, where)
            elif isinstance(statement, BindingStatement):
                self._bind(statement, where)
        self.open_files.pop()

    def read_binding(self, binding: str) -> None:
        name, equals, text = (part.strip() for part in binding.partition("="))
        if not equals or not re.fullmatch(r"[\w./]+", name) or "\n" in text:
            raise UserError(
                f"--gin.{' '.join(binding.split())}: give one binding, --gin.Name.field=value, "
                "for instance --gin.Optimizer.learning_rate=3e-4"
            )
        line = f"{name} = {text}"
        try:
            statements = list(_statements(line, _COMMAND_LINE))
        except UserError:
            if not _is_bare_text(line):
                raise
            statements = list(_statements(f"{name} = {text!r}", _COMMAND_LINE))
        self._bind(statements[0], _COMMAND_LINE)
        if not statements[0].arg_name and name not in self.uses:
            raise UserError(
                f"--gin.{name}={text}: no gin file uses a macro %{name}{_near(name, self.uses)}; a "
                "binding is --gin.Name.field=value"
            )

    def _bind(self, statement: BindingStatement, where: str) -> None:
        scope, component, field = statement.scope, statement.selector, statement.arg_name
        self._check_references(statement, where)
        if not field:  # NAME = value, for %NAME
            name = f"{scope}/{component}" if scope else component
            self.macros[name] = where
            gin.bind_parameter((name, "gin.macro", "value"), statement.value)
            return
        key = f"{component}.{field}"
        if component in COMPONENTS:
            if scope:
                raise UserError(
                    f"{scope}/{key} ({where}): scopes have no meaning here; write {key}"
                )
            self._check_field(component, field, where)
            self.where[component, field] = where
            gin.bind_parameter(("", f"olmo_jax.{component}", field), statement.value)
            return
        try:  # an imported module may have configurables of its own
            assert self.allow_imports
            gin.bind_parameter((scope, component, field), statement.value)
        except (AssertionError, ValueError):
            raise UserError(
                f"{key} ({where}): unknown component {component}{_near(component, COMPONENTS)}; "
                f"allowed are {', '.join(COMPONENTS)}"
            ) from None

    def _check_field(self, component: str, field: str, where: str) -> None:
        if field in _TYPES[component]:
            return
        near = _near(field, _TYPES[component], f"{component}.")
        if not near:  # the right field at the wrong component
            others = [f"{name}.{field}" for name, types in _TYPES.items() if field in types]
            near = f", did you mean {others[0]}?" if others else ""
        allowed = "" if near else f"; allowed are {', '.join(_TYPES[component])}"
        raise UserError(
            f"{component}.{field} ({where}): {component} has no field {field}{near}{allowed}"
        )

    def _check_references(self, statement: BindingStatement, where: str) -> None:
        for value in _leaves(statement.value):
            if not isinstance(value, (_Unknown, gin.config.ConfigurableReference)):
                continue
            if str(value).startswith("%"):
                self.uses.setdefault(str(value)[1:], where)
                continue
            name = value.name if isinstance(value, _Unknown) else value.scoped_selector
            # Without imports all that gin could know is its own machinery.
            if isinstance(value, _Unknown) or name in COMPONENTS or not self.allow_imports:
                raise UserError(
                    f"{_key(statement)} = @{name} ({where}): nothing is known by that reference; "
                    "give a value, or a macro (%NAME)"
                )

    def check_macros(self) -> None:
        for name, where in self.uses.items():
            if name not in self.macros and not name.startswith("gin."):
                raise UserError(
                    f"%{name} ({where}): no such macro{_near(name, self.macros)}; give "
                    f"it a value with a line {name} = …"
                )

    def _import(self, statement: ImportStatement, where: str) -> None:
        if not self.allow_imports:
            raise UserError(
                f"{statement.format()} ({where}): imports are refused, a configuration file is not "
                "code; give --allow_gin_imports if you trust every file"
            )
        try:
            importlib.import_module(statement.module)
        except ImportError as error:
            raise UserError(f"{statement.format()} ({where}): {error}") from None


def _statements(text: str, name: str) -> Iterator[Any]:
    """gin's statements; a syntax error becomes one line that names the place and the remedy."""
    source = io.StringIO(text)
    source.name = name  # type: ignore[attr-defined]
    try:
        parser = ConfigParser(source, _Delegate())
        for statement in parser:
            if not isinstance(statement, BlockDeclaration):
                yield statement
    except SyntaxError as error:
        lines = text.splitlines()
        number = min(error.lineno or 1, len(lines))
        line = lines[number - 1] if lines else ""
        where = name if name == _COMMAND_LINE else f"{name}:{number}"
        raise UserError(f"{where}: {_syntax_hint(line, str(error.msg))}") from None
    except (tokenize.TokenError, TypeError) as error:  # TypeError: a list as the key of a dict
        raise UserError(f"{name}: not gin syntax, {error.args[0]}") from None


def _syntax_hint(line: str, message: str) -> str:
    """What is wrong with a line that gin cannot parse, and what to write instead."""
    key, _, value = (part.strip() for part in line.partition("#")[0].partition("="))
    if value.lower() in _CONSTANTS:
        return f"{key} = {value}: write {_CONSTANTS[value.lower()]}"
    if _is_bare_text(line):
        return f'{key} = {value}: text needs quotes, write {key} = "{value}"'
    return f"not gin syntax, {message.splitlines()[0].rstrip('.')}: {line.strip()}"


def _is_bare_text(line: str) -> bool:
    """Whether a binding's value looks like text without its quotes."""
    value = line.partition("=")[2].partition("#")[0].strip()
    return (
        bool(value) and value.lower() not in _CONSTANTS and not re.search(r"[\"'()\[\]{}]", value)
    )


def _existing(name: str, folders: Iterable[Path], where: str) -> Path:
    """The file `name` in the first of the folders that has it."""
    places = list(dict.fromkeys(folder / Path(name).expanduser() for folder in folders))
    for place in places:
        if place.is_file():
            return place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place
    siblings = [str(p) for place in places for p in place.parent.glob("*.gin")]
    near = difflib.get_close_matches(str(places[0]), siblings, n=1)
    hint = f", did you mean {Path(near[0]).name}?" if near else ""
    looked = " or ".join(str(place.parent) for place in places)
    raise UserError(f"{where}: no gin file {name} in {looked}{hint}")


# --- building -----------------------------------------------------------------------------------


def _build(values: dict[str, dict[str, Any]], where: dict[tuple[str, str], str]) -> RunConfig:
    """Validated dataclasses; every fault of every component is one line of the UserError."""
    faults: list[str] = []
    parts = {}
    for name, cls in COMPONENTS.items():
        given = {}
        for field, value in values[name].items():
            try:
                given[field] = checked(value, _TYPES[name][field])
            except ValueError:
                hint = _TYPES[name][field]
                faults.append(
                    f"{name}.{field} = {value!r} ({where[name, field]}): allowed is "
                    f"{allowed(hint)}{_near(str(value), choices(hint))}{_as_tuple(value, hint)}"
                )
        if len(given) < len(values[name]):
            continue
        try:
            if (chosen := given.pop("preset", None)) is not None:
                given = asdict(preset(chosen)) | given
            parts[name.lower()] = cls(**given)
        except UserError as error:
            faults.append(f"{name}.preset ({where[name, 'preset']}): {error}")
        except ValidationError as error:
            faults += [_placed(name, fault, where) for fault in validation_faults(error)]
    if faults:
        raise UserError("\n".join(faults))
    return RunConfig(**parts)


def _placed(name: str, fault: str, where: dict[tuple[str, str], str]) -> str:
    """A fault with its component, and where gin gives the fields that it speaks of."""
    if name == "Model" and fault.endswith("not given"):
        return f"Model: {fault}; give a released model, Model.preset = one of {', '.join(PRESETS)}"
    places = dict.fromkeys(
        place
        for (component, field), place in where.items()
        if component == name and re.search(rf"\b{field}\b", fault)
    )
    return f"{name}: {fault}" + (f" ({', '.join(places)})" if places else "")


def _as_tuple(value: Any, hint: Any) -> str:
    """The hint to add brackets and a comma, where that is all that is missing."""
    try:
        return f"; write {checked((value,), hint)!r}" if not isinstance(value, tuple) else ""
    except ValueError:
        return ""


# --- small helpers ------------------------------------------------------------------------------


def _leaves(value: Any) -> Iterator[Any]:
    """Everything in nested lists, tuples and dicts."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)) and not isinstance(value, _Unknown):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _key(statement: BindingStatement) -> str:
    return ".".join(part for part in (statement.selector, statement.arg_name) if part)


def _near(name: str, known: Iterable[Any], prefix: str = "") -> str:
    """The hint ", did you mean X?", or nothing where no name is near."""
    names = {str(k).lower(): str(k) for k in known}
    found = difflib.get_close_matches(name.lower(), names, n=1)
    return f", did you mean {prefix}{names[found[0]]}?" if found else ""
