"""Tries an installed llm2clip: `installed.py FOLDER` fails unless it lies below FOLDER and all its parts are there.

Imports every module, prints the help of every verb, and reads the files that are no modules.
"""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Try it."""
    import llm2clip
    from llm2clip.eval.report import PAGES, environment
    from llm2clip.export.card import TEMPLATE
    from llm2clip.verbs import VERBS

    package = Path(llm2clip.__file__).parent
    assert package.is_relative_to(folder.resolve()), f"{package} is not the installed one"
    modules = [module.name for module in pkgutil.walk_packages([str(package)], "llm2clip.")]
    for name in modules:
        if name != "llm2clip.__main__":
            importlib.import_module(name)
    assert "{{ title }}" in TEMPLATE.read_text(encoding="utf-8") and (package / "py.typed").is_file()
    for page in PAGES:
        environment().get_template(page)
    for verb in [verb for verb in VERBS if verb != "demo"]:  # which is not installed
        subprocess.run([sys.executable, "-m", "llm2clip", *verb.split(), "--help"], check=True, capture_output=True)
    print(f"{len(modules)} modules and {len(VERBS) - 1} verbs of {package.parent} work")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
