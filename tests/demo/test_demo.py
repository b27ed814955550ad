"""The demo's quick form end to end: every part runs, the page is whole, equal seeds give equal tables."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from demo import jobs, results
from demo.config import BUDGETS, DemoConfig
from demo.jobs import Job, pipeline, run_jobs
from demo.page import cra_table, retrieval_table
from demo.run import SHIPPED, run_demo
from llm2clip.errors import LLM2CLIPError, UsageError


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_demo(DemoConfig(out=tmp_path_factory.mktemp("demo") / "demo", quick=True))


@pytest.mark.ci
def test_it_leaves_a_whole_folder(demo: Path) -> None:
    manifest = json.loads((demo / "manifest.json").read_text())
    assert manifest["format"] == "llm2clip/demo" and manifest["config"]["quick"] is True
    found = json.loads((demo / "results.json").read_text())
    arms = {f"{arm}-all" for arm in results.ARMS if arm != "A"} | {"A", "B-tenth", "B-long-tenth", "C-tenth", "D-tenth"}
    assert arms <= set(found)
    for arm in arms:
        assert {*results.COLUMNS, *results.CLASSES} <= set(found[arm])
    for teacher in results.TEACHERS:
        assert set(results.CRA_ENGLISH) <= set(found[f"teacher-{teacher}"])


@pytest.mark.ci
def test_the_page_loads_nothing_and_says_what_it_is(demo: Path) -> None:
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", page)
    assert "its numbers mean nothing" in page  # a quick run says so
    for word in (
        "B-long",
        "unseen words",
        "Spanish",
        "Chinese",
        "ceiling",
        "by chance",
        "colour",
        "torch",
        "<svg",
        "<img",
    ):
        assert word in page
    assert page.count("<tr") == page.count("</tr>") and page.endswith("</html>")


@pytest.mark.ci
def test_again_it_is_complete_and_untouched(demo: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = (demo / "report.html").stat().st_mtime_ns
    with caplog.at_level("INFO", "llm2clip"):
        run_demo(DemoConfig(out=demo, quick=True))
    assert "already complete" in caplog.text and (demo / "report.html").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="seed"):
        run_demo(DemoConfig(out=demo, quick=True, seed=1))


@pytest.mark.slow
def test_a_run_cut_short_goes_on_with_what_is_missing(demo: Path) -> None:
    whole, kept = (demo / "results.json").read_bytes(), demo / "seed-0" / "models" / "D-all" / "manifest.json"
    before = kept.stat().st_mtime_ns
    for path in ("manifest.json", "report.html", "results.json", "seed-0/times.json"):
        (demo / path).unlink()
    shutil.rmtree(demo / "seed-0" / "scores" / "D-all")
    run_demo(DemoConfig(out=demo, quick=True))
    assert (demo / "results.json").read_bytes() == whole
    assert kept.stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_same_seed_gives_the_same_table_whatever_the_processes(demo: Path, tmp_path: Path) -> None:
    again = run_demo(DemoConfig(out=tmp_path / "again", quick=True, processes=1))
    assert (again / "results.json").read_bytes() == (demo / "results.json").read_bytes()


@pytest.mark.parametrize("changes", [{"size": "medium"}, {"seeds": 0}, {"quick": True, "size": "large"}])
def test_impossible_settings_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        DemoConfig(out=Path("demo"), **changes)  # type: ignore[arg-type]


def test_jobs_come_after_what_they_need() -> None:
    found = pipeline(Path("x"), SHIPPED / "llm", SHIPPED / "clip", BUDGETS["quick"], 0)
    names = [job.name for job in found]
    assert len(set(names)) == len(names)
    for index, job in enumerate(found):
        assert set(job.needs) <= set(names[:index])
    fewer = pipeline(Path("x"), SHIPPED / "llm", SHIPPED / "clip", BUDGETS["small"], 0, ablations=False)
    left_out = set(names) - {job.name for job in fewer}
    assert left_out == {"stage 1 full all", "raw causal"} | {
        f"{part} {arm}-all" for part in ("bank", "stage 2", "score") for arm in ("D-full", "C-causal")
    } | {"CRA full", "CRA raw-causal"}
    assert all(set(job.needs) <= {job.name for job in fewer[:index]} for index, job in enumerate(fewer))


def test_without_the_ablations_their_claims_and_rows_are_left_out() -> None:
    kinds = {name: results.Value((0.5,), 100) for name in (*results.COLUMNS, *results.CRA_ENGLISH, *results.CRA_BEYOND)}
    names = ["A", *(f"{arm}-{share}" for arm in ("B", "B-long", "C", "D") for share in ("all", "tenth"))]
    teachers = [f"teacher-{name}{part}" for name in ("raw-two-way", "lora") for part in ("", "-beyond")]
    found = dict.fromkeys([*names, *teachers], kinds)
    claims = results.verdicts(found)
    assert len(claims) == 9 and not any("Full fine-tuning" in claim.claim for claim in claims)
    assert len(results.verdicts({**found, "D-full-all": kinds})) == 10
    page = retrieval_table(found, "all", {}) + cra_table(found)
    assert "D-full" not in page and "causal" not in page and "stage 1, LoRA" in page


def test_jobs_with_the_longest_way_to_go_are_first() -> None:
    first, second, third = Job("a", print, {}, cost=5), Job("b", print, {}, ("a",), 7), Job("c", print, {}, cost=11)
    assert jobs._seconds_behind([first, second, third]) == {"a": 12, "b": 7, "c": 11}


def test_a_failing_job_ends_in_its_error(tmp_path: Path) -> None:
    failing: Callable[[], None] = _fail
    with pytest.raises(LLM2CLIPError, match="it broke"):
        run_jobs([Job("broken", failing, {}), Job("after", print, {}, ("broken",))], processes=1, log=tmp_path / "log")


def _fail() -> None:
    raise LLM2CLIPError("it broke")
