"""The mutation check on a toy package: mutants that a test kills, that never end, that live, that nothing runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mutmut", reason="comes with the extra `mutate`")
TOOL = Path(__file__).parents[1] / "tools" / "mutate.py"
FILES = {
    "pyproject.toml": '[tool.pytest.ini_options]\naddopts = "--import-mode=importlib"\n',
    "docs/page.md": "",
    "src/toy/__init__.py": "",
    "src/toy/sums.py": """
import functools


@functools.cache
def twice(n):
    total = 0
    while n > 0:
        n = n - 1
        total = total + 2
    return total


def is_many(n):
    return n > 3


def unseen():
    return 5
""",
    "tests/test_sums.py": """
import os
import subprocess
import sys

from toy.sums import is_many


def test_in_another_process():
    code = "from toy.sums import twice; print(twice(3))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        with open(os.environ["TOY_PROCESSES"], "a") as file:
            print(process.pid, file=file)
        assert process.communicate()[0] == "6\\n"


def test_five_are_many():
    assert is_many(5)
""",
    "tools/mutate.toml": """
package = "src/toy"

[tests]
"sums.py" = ["test_sum*.py"]

[settings]
timeout_constant = 0.5
""",
    "tools/equivalent.toml": """
[[equivalent]]
module = "sums.py"
function = "is_many"
diff = '''
-    return n > 3
+    return n >= 3
'''
reason = "three and a half are not counted"
""",
}


@pytest.mark.slow
def test_scores_of_a_toy(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    environment = {**os.environ, "TOY_PROCESSES": str(tmp_path / "processes.txt")}

    def mutate(*arguments: str) -> str:
        command = [sys.executable, str(TOOL), "--processes", "2", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    mutate()
    row = next(line for line in (tmp_path / "docs/mutation.md").read_text().splitlines() if line.startswith("| `"))
    # of twice(): 0 -> 1, None; > -> >=, 0 -> 1; n - 1 -> None, n + 1, n - 2; total + 2 -> None, total - 2, total + 3
    # of is_many(): >=, 4; of unseen(): 6. Only n + 1 never ends; `is_many(5)` does not see 3 from 4
    assert row.split(" | ")[1:-2] == ["13", "10", "1", "2", "1", "1"]
    assert "three and a half" in (tmp_path / "docs/mutation.md").read_text()
    survivors = [line for line in mutate("--show").splitlines() if line.startswith(("#", "+ "))]
    assert survivors[1::2] == ["+    return n > 4", "+    return 6"]

    started = (tmp_path / "processes.txt").read_text().split()
    assert not [process for process in started if Path("/proc", process).exists()]

    mutate("--survivors")  # nothing to do
    assert (tmp_path / "processes.txt").read_text().split() != started  # but the tests on the code as it is
    assert row in (tmp_path / "docs/mutation.md").read_text()
