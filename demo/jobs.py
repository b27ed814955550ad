"""The jobs of one pipeline, what each needs, and running them in a few processes with one bar and the time left."""

from __future__ import annotations

import concurrent.futures as futures
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import arms, gallery
from demo.config import Budget
from llm2clip.errors import LLM2CLIPError
from llm2clip.progress import Progress


@dataclass(frozen=True)
class Job:
    """A part of the pipeline.

    Attributes:
        needs: names of the jobs that must be done before.
        cost: seconds it takes on one core, roughly; decides order and time left.
    """

    name: str
    run: Callable[..., Any]
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()
    cost: float = 10


def pipeline(folder: Path, llm: Path, clip: Path, budget: Budget, seed: int, *, ablations: bool = True) -> list[Job]:
    """The jobs of one seed; jobs come after those they need. `ablations`: with the arms C-causal and D-full."""
    made: dict[str, Any] = {"folder": folder, "budget": budget, "seed": seed}
    tower = folder / "tower"
    jobs = [
        Job("data", arms.make_data, made, cost=12),
        Job("tower", arms.make_tower, {"clip": clip, "out": tower}, cost=2),
        _score("A", folder, str(clip), None, ("data",)),
    ]
    for share, factor in (("all", 1.0), ("tenth", 0.6)):
        teach = {**made, "llm": llm, "share": share}
        jobs.append(
            Job(f"stage 1 lora {share}", arms.make_teacher, {**teach, "tuning": "lora"}, ("data",), 110 * factor)
        )
        if share == "all" and ablations:
            jobs.append(Job("stage 1 full all", arms.make_teacher, {**teach, "tuning": "full"}, ("data",), 110))
        for arm, cost in (("B-long", 130), ("B", 50)):
            training = {**made, "clip": clip, "arm": arm, "share": share}
            jobs.append(Job(f"train {arm} {share}", arms.make_clip, training, ("data",), cost * factor))
            name = f"{arm}-{share}"
            jobs.append(_score(name, folder, str(folder / "models" / name), None, (f"train {arm} {share}",)))
    for attention in ("causal", "two-way") if ablations else ("two-way",):
        settings = {"folder": folder, "llm": llm, "attention": attention}
        jobs.append(Job(f"raw {attention}", arms.make_raw_teacher, settings, ("data",), 8))
    taught = [("D", "all"), ("D", "tenth"), ("C", "all"), ("C", "tenth")]
    for arm, share in [*taught, ("D-full", "all"), ("C-causal", "all")] if ablations else taught:
        jobs += _taught(made, tower, arm, share)
    shown = {name: (str(folder / "models" / f"{name}-all"), _teacher(folder, name, "all")) for name in ("B-long", "D")}
    needs = ("score B-long-all", "score D-all")
    jobs.append(Job("gallery", gallery.make_gallery, {"folder": folder, "arms": shown, "seed": seed}, needs, 10))
    return jobs


def _teacher_name(arm: str, share: str) -> str:
    name = arms.TEACHERS[arm]
    return name if name.startswith("raw") else f"{name}-{share}"


def _teacher(folder: Path, arm: str, share: str) -> str | None:
    return str(folder / "teachers" / _teacher_name(arm, share)) if arm in arms.TEACHERS else None


def _taught(made: dict[str, Any], tower: Path, arm: str, share: str) -> list[Job]:
    """Bank, student and scores of an arm with a teacher, and the teacher's own scores."""
    folder, name, factor = made["folder"], f"{arm}-{share}", 1.0 if share == "all" else 0.5
    teacher = _teacher_name(arm, share)
    tuned = not teacher.startswith("raw")
    before = f"stage 1 {arms.TEACHERS[arm]} {share}" if tuned else teacher.replace("-", " ", 1)
    banked = {"folder": folder, "teacher": teacher, "share": share, "out": name}
    trained = {**made, "clip": tower, "arm": arm, "bank": name, "share": share}
    model, path = str(folder / "models" / name), _teacher(folder, arm, share)
    jobs = [
        Job(f"bank {name}", arms.make_bank, banked, (before,), 25 if share == "all" else 4),
        Job(f"stage 2 {name}", arms.make_student, trained, (f"bank {name}", "tower"), 45 * factor),
        _score(name, folder, model, path, (f"stage 2 {name}",)),
    ]
    if share == "all":
        settings = {"folder": folder, "teacher": str(path), "name": arms.TEACHERS[arm]}
        jobs.append(Job(f"CRA {arms.TEACHERS[arm]}", arms.score_teacher, settings, (before,), 8))
    return jobs


def _score(name: str, folder: Path, model: str, teacher: str | None, needs: tuple[str, ...]) -> Job:
    settings = {"folder": folder, "model": model, "teacher": teacher, "name": name}
    return Job(f"score {name}", arms.score, settings, needs, 8)


def run_jobs(jobs: Sequence[Job], *, processes: int, log: Path) -> dict[str, float]:
    """Run jobs as soon as what they need is done, those with the longest way to go first; returns seconds by job.

    Each process computes with one thread, so results do not depend on how many there are.

    Raises:
        LLM2CLIPError: naming the job that failed and its error.
    """
    left = _seconds_behind(jobs)
    waiting = {job.name: job for job in sorted(jobs, key=lambda job: -left[job.name])}
    done: dict[str, float] = {}
    running: dict[futures.Future[float], Job] = {}
    context = multiprocessing.get_context("spawn")
    with (
        Progress(round(sum(job.cost for job in jobs)), description="demo", unit="s of work") as progress,
        futures.ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(log,)) as pool,
    ):
        while waiting or running:
            for job in list(waiting.values()):
                if len(running) < processes and all(need in done for need in job.needs):
                    running[pool.submit(_timed, job.run, job.settings)] = waiting.pop(job.name)
            for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    done[job.name] = future.result()
                except LLM2CLIPError:
                    raise
                except futures.process.BrokenProcessPool:
                    raise LLM2CLIPError(f"the process of {job.name!r} was killed; {log} may say why") from None
                progress.advance(round(job.cost), note=f"done: {job.name}")
    return done


def _seconds_behind(jobs: Sequence[Job]) -> dict[str, float]:
    """For each job, the seconds of the longest chain of jobs that begins with it."""
    longest: dict[str, float] = {}
    for job in reversed(jobs):
        after = [longest[other.name] for other in jobs if job.name in other.needs and other.name in longest]
        longest[job.name] = job.cost + max(after, default=0.0)
    return longest


def _start(log: Path) -> None:
    """Prepare a process: one thread, what it says goes to the log file."""
    import logging

    import torch

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.dup2(descriptor, 1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


def _timed(run: Callable[..., Any], settings: dict[str, Any]) -> float:
    start = time.monotonic()
    run(**settings)
    return round(time.monotonic() - start, 1)
