"""The scripts in launch/ as modules: they are programs, not a package."""

import importlib.util
from pathlib import Path

LAUNCH = Path(__file__).parents[2] / "launch"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
