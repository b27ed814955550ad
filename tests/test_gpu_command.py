"""scripts/gpu without a GPU: no part holds up the others, a cut run leaves its table, the plan fits, wheels travel."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed

from benchmarks import course, gpu, wheels  # noqa: E402
from benchmarks.course import Part, Record, RowsFile, seconds_for  # noqa: E402
from benchmarks.device import rounds  # noqa: E402
from benchmarks.rows import line  # noqa: E402

GOOD = """
import json, sys
rows = sys.argv[sys.argv.index("--rows") + 1]
def add(value):
    with open(rows, "a") as file:
        file.write(json.dumps({"name": "a figure", "value": value, "unit": "things/s"}) + "\\n")
add(7)
"""
HANGS = (
    GOOD
    + """
import os, signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(900)"])
with open(sys.argv[1], "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
time.sleep(900)
"""
)
CRASHES = GOOD + "\nprint('fine so far', flush=True)\nraise SystemExit('the GPU is on fire')\n"


def part(name: str, code: str, *words: str, budget: float = 30, needs: tuple[str, ...] = ()) -> Part:
    return Part(name=name, command=(sys.executable, "-S", "-c", code, *words), budget=budget, needs=needs)


def follow(parts: list[Part], out: Path, *, seconds: float) -> tuple[int, dict[str, Any]]:
    out.mkdir(exist_ok=True)
    record = Record(out, {"device": "none"})
    code = gpu.follow(parts, record, deadline=time.monotonic() + seconds, environment=dict(os.environ))
    return code, json.loads((out / course.FIGURES).read_text())["parts"]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Any) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come about within a minute")


@pytest.mark.ci
def test_a_part_that_hangs_is_ended_with_its_child_and_the_next_one_runs(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    parts = [part("hangs", HANGS, str(pids), budget=5), part("good", GOOD)]
    code, found = follow(parts, tmp_path / "out", seconds=60)
    assert [found[name]["state"] for name in ("hangs", "good")] == ["over budget", "done"]
    assert [row["value"] for row in found["hangs"]["rows"]] == [7]  # what it measured before counts
    assert [row["value"] for row in found["good"]["rows"]] == [7]
    assert code == 1
    wait_until(lambda: not any(map(is_running, map(int, pids.read_text().split()))))
    table = (tmp_path / "out" / course.TABLE).read_text()
    assert "| hangs | a figure | 7 things/s |" in table and "| hangs | over budget |" in table


@pytest.mark.ci
def test_all_parts_together_keep_to_the_time(tmp_path: Path) -> None:
    parts = [part(f"hangs {i}", HANGS, str(tmp_path / "pids"), budget=3) for i in range(300)]
    start = time.monotonic()
    _, found = follow(parts, tmp_path / "out", seconds=7)
    assert time.monotonic() - start < 300  # with a budget for each it would be 900
    assert found["hangs 0"]["state"] == "over budget"
    assert found["hangs 299"]["state"] == "not measured" and "s were left" in found["hangs 299"]["reason"]


def test_a_part_that_crashes_is_told_of_and_the_next_one_runs(tmp_path: Path) -> None:
    code, found = follow([part("crashes", CRASHES), part("good", GOOD)], tmp_path / "out", seconds=60)
    assert found["crashes"]["state"] == "failed" and found["good"]["state"] == "done"
    assert found["crashes"]["reason"] == "exit code 1: the GPU is on fire"
    assert code == 1
    assert "fine so far" in (tmp_path / "out" / course.LOG).read_text()


def test_a_part_without_its_package_is_not_measured_and_that_is_no_failure(tmp_path: Path) -> None:
    parts = [part("peer", GOOD, needs=("json", "no_such_package")), part("good", GOOD)]
    code, found = follow(parts, tmp_path / "out", seconds=60)
    assert found["peer"]["state"] == "not measured" and "no_such_package not installed" in found["peer"]["reason"]
    assert found["good"]["state"] == "done" and code == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_cut_leaves_table_and_figures(tmp_path: Path, how: signal.Signals) -> None:
    out, pids = tmp_path / "out", tmp_path / "pids"
    driver = f"""
import signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from benchmarks import gpu
import test_gpu_command as here
signal.signal(signal.SIGTERM, gpu.stop)
parts = [here.part("good", here.GOOD), here.part("hangs", here.HANGS, {str(pids)!r}, budget=600)]
here.follow([*parts, here.part("last", here.GOOD)], Path({str(out)!r}), seconds=900)
"""
    runner = subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.DEVNULL)
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    wait_until(lambda: "| hangs | a figure | 7 things/s |" in (out / course.TABLE).read_text())
    runner.send_signal(how)
    assert runner.wait(60) == (143 if how == signal.SIGTERM else -signal.SIGKILL)
    found = json.loads((out / course.FIGURES).read_text())["parts"]
    assert [found[name]["state"] for name in ("good", "hangs", "last")] == ["done", "cut", "not reached"]
    assert [len(found[name]["rows"]) for name in ("good", "hangs", "last")] == [1, 1, 0]
    table = (out / course.TABLE).read_text()
    assert "| good | a figure | 7 things/s |" in table and "| last | not reached |" in table
    hanging, child = map(int, pids.read_text().split())
    wait_until(lambda: not is_running(hanging))  # nothing stays on the GPU
    if how == signal.SIGKILL:
        os.kill(child, signal.SIGKILL)  # the kernel ends only those that the runner started itself
    wait_until(lambda: not is_running(child))


def test_what_a_part_may_take() -> None:
    assert seconds_for(20, left=100, later=75) == 25  # the others leave it five more
    assert seconds_for(20, left=100, later=90) == 20  # they do not, and are late themselves
    assert seconds_for(20, left=12, later=90) == 12
    assert seconds_for(20, left=1000, later=0) == 40  # twice its budget at most: it hangs


def test_a_row_that_is_half_written_waits_and_one_that_replaces_takes_a_place(tmp_path: Path) -> None:
    record = Record(tmp_path, {})
    record.plan([part("p", "")])
    rows = RowsFile(tmp_path / "rows")
    rows.move_to(record, "p")
    row = {"name": "n", "unit": "", "replaces": True}
    first, second = (json.dumps({**row, "value": value}) + "\n" for value in (1, 2))
    rows.path.write_text(first + second[:9])
    rows.move_to(record, "p")
    assert [row["value"] for row in record.parts["p"]["rows"]] == [1]
    rows.path.write_text(first + second)
    rows.move_to(record, "p")
    assert [row["value"] for row in record.parts["p"]["rows"]] == [2]


RUN_TESTS = "pytest.main(['-q', '-p', 'no:cacheprovider', '-p', 'no:xdist'], plugins=[tally])"
TESTS = """
import os, pytest
def test_good(): pass
def test_bad(): assert False
@pytest.mark.skip
def test_skipped(): pass
def test_that_takes_all_with_it(): os._exit(9)
"""


def test_what_passed_is_told_even_if_the_tests_come_to_no_end(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    code = (
        f"import pytest, pathlib; from benchmarks.tests import Tally; tally = Tally(pathlib.Path('rows')); {RUN_TESTS}"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 9
    last = json.loads((tmp_path / "rows").read_text().splitlines()[-1])
    assert (last["value"], last["unit"], last["replaces"]) == (1, "passed", True)
    assert re.fullmatch(r"1 failed: test_it\.py::test_bad; 1 skipped; \d+ s", last["against"])


def test_rounds_stop_when_another_would_not_end_in_time() -> None:
    assert list(rounds(3, None)) == [0, 1, 2]
    assert list(rounds(3, time.monotonic() + 600)) == [0, 1, 2]
    assert list(rounds(3, time.monotonic() - 1)) == [0]  # one is a figure, none is nothing


def test_a_line_of_the_table() -> None:
    row = {"name": "ours", "value": 1234.5, "unit": "things/s", "ratio": 0.9, "against": "theirs"}
    assert line(row) == "| ours | 1,234 things/s | 0.900 | theirs |"
    row |= {"spread": (0.85, 0.95), "clock_mhz": 1980}
    assert line(row) == "| ours | 1,234 things/s | 0.900 | theirs, 0.85 to 0.95, 1,980 MHz |"
    assert line({"name": "x", "value": None, "unit": "", "reason": "why"}) == "| x | not measured |  | why |"


def test_the_loader_is_compared_with_the_step_of_the_same_run(tmp_path: Path) -> None:
    record = Record(tmp_path, {})
    record.plan([part("step 512", ""), part("loader gpu", "")])
    gpu.compare_loader_with_step(record, "loader gpu")
    assert record.parts["loader gpu"]["rows"] == []
    record.add("step 512", {"name": "ViT: ours", "value": 200.0, "unit": "images/s"})
    record.add("loader gpu", {"name": "ours, 16 workers", "value": 5000.0, "unit": "images/s", "ratio": 0.9})
    gpu.compare_loader_with_step(record, "loader gpu")
    added = record.parts["loader gpu"]["rows"][-1]
    assert added["ratio"] == 25 and "ViT: ours" in added["against"]


@pytest.mark.parametrize(("device", "minutes"), [("cuda", 5), ("cpu", 3), ("cuda", 12)])
def test_the_plan_fits_into_its_minutes(device: str, minutes: float) -> None:
    parts = gpu.plan(device, minutes)
    assert sum(part.budget for part in parts) + gpu.PREPARATION + gpu.RESERVE <= 60 * minutes + 1e-6
    assert "only if" not in gpu.plan_as_text(parts, minutes)


def sizes_of(benchmark: str) -> set[str]:
    """The keys of a benchmark's table of sizes, read without the seconds that it takes to import it."""
    for node in ast.parse((ROOT / "benchmarks" / f"{benchmark}.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SETTINGS":
            return {ast.literal_eval(key) for key in node.value.keys}
    raise AssertionError(f"{benchmark} has no SETTINGS")


def test_the_plan_names_benchmarks_and_sizes_that_there_are() -> None:
    for one in (*gpu.on_gpu()[1:], *gpu.on_cpu()[1:]):
        name, sizes = one.command[3], one.command[one.command.index("--size") + 1 :]
        assert sizes and set(sizes) <= sizes_of(name), one.name


def test_a_dry_run_lists_parts_with_their_seconds_and_needs_no_gpu() -> None:
    lines = subprocess.run(**script("--dry-run"), check=True).stdout.splitlines()
    listed = [int(found[1]) for text in lines[:-1] if (found := re.match(r" *(\d+) s  ", text))]
    assert len(listed) == len(lines) - 1 == len(gpu.plan("cuda", 5)) + 2
    assert lines[-1].split() == [str(sum(listed)), "s", "of", "300"] and sum(listed) <= 300
    short = subprocess.run(**script("--dry-run", "--minutes", "2"), check=True).stdout
    assert "only if those before it end sooner" in short


def script(*words: str, **environment: str) -> dict[str, Any]:
    """What subprocess.run takes for scripts/gpu in this Python."""
    fixed = {"LLM2CLIP_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [str(ROOT / "scripts" / "gpu"), *words]
    return {"args": command, "env": {**os.environ, **fixed, **environment}, "capture_output": True, "text": True}


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(**script("--out", str(tmp_path / "out")))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr and "--dry-run" in done.stderr
    assert not (tmp_path / "out").exists()


def write_wheel(folder: Path, package: str, version: str = "1.0") -> Path:
    """A wheel with one module, named as the package."""
    folder.mkdir(exist_ok=True)
    name = package.replace("-", "_")
    path, facts = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", "value = 1\n")
        file.writestr(f"{facts}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        file.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{facts}/RECORD", f"{name}.py,,\n{facts}/METADATA,,\n{facts}/WHEEL,,\n{facts}/RECORD,,\n")
    return path


def test_wheels_are_fetched_weighed_and_refused_if_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in wheels.PACKAGES:
        write_wheel(tmp_path / "index", package)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)  # of the oldest versions, which that index has not
    said = wheels.fetch(tmp_path / "fetched")
    assert f"{len(wheels.PACKAGES)} wheels, 0.0 MiB" in said
    assert len(list((tmp_path / "fetched").iterdir())) == len(wheels.PACKAGES)
    with pytest.raises(wheels.WheelsError, match="holds wheels already"):
        wheels.fetch(tmp_path / "fetched")
    monkeypatch.setattr(wheels, "MOST_MIB", 0.001)
    with pytest.raises(wheels.WheelsError, match=r"more than 0\.001"):
        wheels.fetch(tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_two_versions_of_a_package_are_refused(tmp_path: Path) -> None:
    both = [write_wheel(tmp_path, "some-package", version) for version in ("1.0", "2.0")]
    with pytest.raises(wheels.WheelsError, match=r"2\.0.* and .*1\.0.* are one package"):
        wheels.check(both)


def test_only_what_is_missing_is_installed(tmp_path: Path) -> None:
    for package in ("numpy", "zz-not-there-before"):
        write_wheel(tmp_path / "wheels", package)
    said = wheels.install(tmp_path / "wheels", tmp_path / "site", seconds=120)
    assert said == "zz_not_there_before-1.0"
    assert (tmp_path / "site" / "zz_not_there_before.py").exists()
    assert not (tmp_path / "site" / "numpy.py").exists()


def test_a_folder_without_wheels_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(**script("--device", "cpu", "--wheels", str(tmp_path), "--out", str(tmp_path / "out")))
    assert done.returncode == 2 and "holds no wheels" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_whole_course_at_tiny_sizes_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(**script("--device", "cpu", "--minutes", "10", "--out", str(out)))
    parts = json.loads((out / course.FIGURES).read_text())["parts"]
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(parts, "done"), done.stdout
    assert done.returncode == 0
    for name, one in parts.items():
        assert any(row["value"] for row in one["rows"]), name
    table = (out / course.TABLE).read_text()
    for figure in ("bank building", ": ours", "softmax: time", "what a step takes", "passed"):
        assert figure in table
