"""On Windows the package can be imported: nothing in it needs a POSIX module or function to be loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llm2clip

SOURCE = Path(llm2clip.__file__).parent
POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
MISSING = {
    "os": "O_CLOEXEC O_NONBLOCK fchmod fork getuid geteuid killpg mkfifo pread register_at_fork sched_getaffinity "
    "sysconf uname",
    "signal": "SIGCHLD SIGHUP SIGKILL SIGUSR1 SIGUSR2 setitimer",
    "mmap": "MAP_ANONYMOUS MAP_PRIVATE MAP_SHARED MADV_RANDOM PROT_READ",
    "ctypes": "RTLD_NOW",
}
"""Names of the standard library that Windows has not got."""


def on_import(node: ast.AST) -> Iterator[ast.AST]:
    """What of a file runs when it is imported: all but the bodies of functions."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and child not in _at_definition(node):
            continue
        yield from on_import(child)


def _at_definition(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> list[ast.AST]:
    return [function.args, *getattr(function, "decorator_list", [])]


def posix_only(tree: ast.Module) -> list[str]:
    """What an import of a file with this content would ask for in vain on Windows."""
    found = []
    for node in on_import(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in POSIX_MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if node.module in POSIX_MODULES else []
            found += [alias.name for alias in node.names if alias.name in MISSING.get(node.module or "", "").split()]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [node.attr] if node.attr in MISSING.get(node.value.id, "").split() else []
        elif isinstance(node, ast.Call) and ast.unparse(node).startswith("ctypes.CDLL(None"):
            found.append("ctypes.CDLL(None)")
    return found


def test_no_file_asks_for_posix_when_it_is_imported() -> None:
    files = list(SOURCE.rglob("*.py"))
    found = {file.name: asked for file in files if (asked := posix_only(ast.parse(file.read_text(encoding="utf-8"))))}
    assert len(files) > 50 and not found


@pytest.mark.parametrize(
    "line",
    [
        "import fcntl",
        "from resource import getrusage",
        "from os import fork",
        "try:\n    import pwd\nexcept ValueError:\n    pass",
        "class A:\n    flags = os.O_CLOEXEC",
        "def f(n=os.sysconf('SC_PAGE_SIZE')): pass",
        "_libc = ctypes.CDLL(None, use_errno=True)",
        "os.register_at_fork(after_in_child=f)",
    ],
)
def test_what_asks_for_posix_is_found(line: str) -> None:
    assert posix_only(ast.parse(line))
    assert not posix_only(ast.parse("def f():\n" + "\n".join(f"    {part}" for part in line.splitlines())))


IMPORT_ALL = """
import builtins, importlib, pkgutil

class OfWindows:  # a module of the standard library, as the code of llm2clip sees it
    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        if name in MISSING[self._module.__name__].split():
            raise AttributeError(f"module {self._module.__name__!r} has no attribute {name!r}")
        if name == "CDLL":
            return load_library
        return getattr(self._module, name)

def load_library(name, *args, **options):
    if name is None:
        raise TypeError("argument of type 'NoneType' is not iterable")

def import_on_windows(name, globals=None, locals=None, fromlist=(), level=0):
    if not (globals or {}).get("__name__", "").startswith("llm2clip"):
        return real_import(name, globals, locals, fromlist, level)
    if name in POSIX_MODULES:
        raise ModuleNotFoundError(f"No module named {name!r}")
    module = real_import(name, globals, locals, fromlist, level)
    if name not in MISSING:
        return module
    if lacking := set(fromlist or ()) & set(MISSING[name].split()):
        raise ImportError(f"cannot import name {min(lacking)!r} from {name!r}")
    return OfWindows(module)

real_import, builtins.__import__ = builtins.__import__, import_on_windows
package = importlib.import_module(PACKAGE)
found = [PACKAGE, *(module.name for module in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."))]
for name in found:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(found))
"""


def import_all(package: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Import all of `package` in a fresh process, where llm2clip finds of the standard library what Windows has."""
    names = {"POSIX_MODULES": POSIX_MODULES, "MISSING": MISSING, "PACKAGE": package}
    code = "".join(f"{name} = {value!r}\n" for name, value in names.items()) + IMPORT_ALL
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)


@pytest.mark.ci
def test_every_module_can_be_imported() -> None:
    run = import_all("llm2clip", SOURCE.parent)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == len(list(SOURCE.rglob("*.py")))


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("import fcntl", "No module named 'fcntl'"),
        ("from os import fork", "cannot import name 'fork' from 'os'"),
        ("import os; os.register_at_fork(after_in_child=print)", "'os' has no attribute 'register_at_fork'"),
        ("import ctypes; ctypes.CDLL(None)", "TypeError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_found(line: str, error: str, tmp_path: Path) -> None:
    package = tmp_path / "llm2clip_of_linux"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "inner.py").write_text(f"import json, os.path\n{line}\n")
    run = import_all(package.name, tmp_path)
    assert run.returncode == 1 and error in run.stderr
