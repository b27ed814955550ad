"""What a GPU machine without a network may lack, as wheels: collected where there is one, put on the path there."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

PACKAGES = (
    *("tyro", "docstring-parser", "typeguard"),
    *("datasets", "dill", "multiprocess", "xxhash", "pandas", "filelock"),
    *("open_clip_torch", "ftfy", "wcwidth", "webdataset", "braceexpand"),
    "pytest-timeout",
)
"""What this project and its peers import beyond torch, transformers, sentence-transformers, accelerate, peft, pyarrow,
timm and what comes with them. pip is told to look for no more, as that would be torch once again."""
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
MOST_MIB = 60


class WheelsError(Exception):
    """Wheels that cannot be had, or cannot travel; says so in one line."""


def fetch(folder: Path) -> str:
    """Collect the wheels for a 64-bit x86 Linux with Python 3.12 in `folder`, and say what they are and weigh.

    Raises:
        WheelsError: if there are wheels already, pip fails, or they are too large.
    """
    if any(folder.glob("*.whl")):
        raise WheelsError(
            f"{folder} holds wheels already, and two versions of one would not install; name a new folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        done = subprocess.run([*command, "--dest", fresh, *PACKAGES], capture_output=True, text=True)
        if done.returncode:
            errors = [text for text in done.stderr.splitlines() if text.startswith("ERROR")]
            raise WheelsError(f"pip download failed: {' '.join(errors)[:300] or done.stderr[-300:]}")
        wheels = sorted(Path(fresh).glob("*.whl"))
        sizes = check(wheels)
        for wheel in wheels:
            wheel.rename(folder / wheel.name)
    return f"{len(wheels)} wheels, {sizes:.1f} MiB, in {folder}; take it along and say scripts/gpu --wheels {folder}"


def check(wheels: Iterable[Path]) -> float:
    """The MiB of all wheels.

    Raises:
        WheelsError: if they are more than may travel, or a package is there twice.
    """
    names: dict[str, str] = {}
    total = 0.0
    for wheel in wheels:
        package = package_of(wheel)
        if package in names:
            raise WheelsError(f"{wheel.name} and {names[package]} are one package; keep one of them")
        names[package] = wheel.name
        total += wheel.stat().st_size / 2**20
    if total > MOST_MIB:
        raise WheelsError(f"the wheels are {total:.1f} MiB, more than {MOST_MIB}; leave some out")
    return total


def package_of(wheel: Path) -> str:
    """The name of a wheel's package.

    >>> package_of(Path("open_clip_torch-3.3.0-py3-none-any.whl"))
    'open-clip-torch'
    """
    return wheel.name.split("-")[0].replace("_", "-").lower()


def install(folder: Path, target: Path, *, seconds: float) -> str:
    """Unpack those wheels whose package is missing here into `target`; says what came of it.

    Where pip fails it says so, and what needs no wheel can still be measured.

    Raises:
        WheelsError: if there is none, or a package is there twice.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise WheelsError(f"--wheels {folder} holds no wheels; collect some with scripts/gpu --fetch-wheels {folder}")
    check(wheels)
    missing = [wheel for wheel in wheels if not is_installed(package_of(wheel))]
    if not missing:
        return "all installed before"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-compile", "--no-cache-dir", "--target", str(target), *map(str, missing)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"pip install took more than {seconds:.0f} s"
    if done.returncode:
        return f"pip install failed: {' '.join(done.stderr.split())[-300:]}"
    return ", ".join(wheel.name.rsplit("-", 3)[0] for wheel in missing)


def is_installed(package: str) -> bool:
    """Whether this Python has a package, in any version."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
