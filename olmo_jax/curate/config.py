"""Configurations of this room: YAML or JSON files, checked by pydantic, as Dolma's are written."""

from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from olmo_jax import storage
from olmo_jax.errors import UserError, validation_faults


class Config(BaseModel):
    """A part of a configuration: frozen, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Compression(Config):
    """Of the outputs: gz (as when it is not given), zst, or "" for none. Inputs say it by name."""

    input: str | None = None
    output: str | None = None


class WorkDir(Config):
    """Dolma's folders for copies from S3. Not needed here, and not used."""

    input: str | None = None
    output: str | None = None


C = TypeVar("C", bound=Config)


def read_config(path: str, kind: type[C]) -> C:
    """A configuration from a file. Raises UserError with every fault."""
    return parse_config(read_yaml(path), kind, path)


def read_yaml(path: str) -> Any:
    """The content of a YAML (or JSON) file. Raises UserError."""
    try:
        return yaml.safe_load(storage.read(path))
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    except yaml.YAMLError as e:
        raise UserError(f"{path}: is not YAML: {' '.join(str(e).split())}") from None


def parse_config(content: Any, kind: type[C], path: str) -> C:
    """A configuration from parsed YAML. Raises UserError with every fault."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(validation_faults(error))}") from None
