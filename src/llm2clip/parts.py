"""Parts that are found by their names: each is a file of its own in a folder, and nothing else lists it."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any


def part_names(folder: ModuleType) -> list[str]:
    """What there is in a package: the names of its files, as a flag writes them (`my-part`)."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(folder.__path__))


def find_part(folder: ModuleType, name: str, what: str) -> Any:
    """What the file of a name holds as `what`."""
    return getattr(importlib.import_module(f"{folder.__name__}.{name.replace('-', '_')}"), what)
