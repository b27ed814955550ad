"""`llm2clip demo`: the whole method on generated images, its arms compared, one page at the end."""

from __future__ import annotations

import logging
import os
import platform
import time
from pathlib import Path
from typing import Any

from demo.config import BUDGETS, Budget, DemoConfig
from llm2clip.artifacts import is_complete, open_output, read_json, write_json, write_manifest
from llm2clip.config import to_dict

logger = logging.getLogger("llm2clip")
SHIPPED = Path(__file__).parent / "models"
"""The mini models that come with the package, made by `demo.make_models`."""
PAGE, RESULTS, TIMES = "report.html", "results.json", "times.json"


def run_demo(config: DemoConfig) -> Path:
    """Run the pipelines and write the page; returns OUT.

    Run again after a kill, it goes on with what is missing.

    Raises:
        UsageError: if OUT is in use.
        LLM2CLIPError: if a part fails.

    Example:
        >>> run_demo(DemoConfig(out=Path("out/demo"), quick=True))                          # doctest: +SKIP
    """
    out = Path(config.out)
    budget = BUDGETS["quick" if config.quick else config.size]
    with open_output(out, "demo", config=config.settings()):
        if is_complete(out):
            logger.info("%s: already complete", out)
            return out
        start = time.monotonic()
        llm, clip = mini_models(out, config.size)
        folders = [run_pipeline(config, budget, seed, llm, clip) for seed in seeds_of(config)]
        finish(config, budget, folders, seconds=time.monotonic() - start)
    return out


def seeds_of(config: DemoConfig) -> range:
    """The seeds of the pipelines."""
    return range(config.seed, config.seed + config.seeds)


def mini_models(out: Path, size: str) -> tuple[Path, Path]:
    """Folders of the mini LLM and the mini CLIP; the large ones are made first."""
    if size == "small":
        return SHIPPED / "llm", SHIPPED / "clip"
    from demo.make_models import LARGE_CLIP, LARGE_IMAGES, LARGE_LLM, make_clip, make_llm

    llm, clip = out / "mini" / "llm", out / "mini" / "clip"
    if not (llm / "origin.json").exists():
        make_llm(llm, LARGE_LLM)
    if not (clip / "origin.json").exists():
        make_clip(clip, LARGE_CLIP, images=LARGE_IMAGES)
    return llm, clip


def run_pipeline(config: DemoConfig, budget: Budget, seed: int, llm: Path, clip: Path) -> Path:
    """All jobs of one seed; returns their folder."""
    from demo.jobs import pipeline, run_jobs

    folder = Path(config.out) / f"seed-{seed}"
    if (folder / TIMES).exists():
        return folder
    folder.mkdir(exist_ok=True)
    logger.info("seed %d: what each part says goes to %s", seed, folder / "log.txt")
    jobs = pipeline(folder, llm, clip, budget, seed, ablations=config.ablations or config.quick)
    seconds = run_jobs(jobs, processes=config.processes, log=folder / "log.txt")
    write_json(folder / TIMES, seconds)
    return folder


def finish(config: DemoConfig, budget: Budget, folders: list[Path], *, seconds: float) -> None:
    """Put the results together and write the page; the manifest comes last."""
    from demo import results
    from demo.page import write_page

    out = Path(config.out)
    found = results.collect(folders)
    write_json(out / RESULTS, results.as_json(found))
    facts: dict[str, Any] = {
        "settings": config.settings(),
        "budget": to_dict(budget),
        "machine": machine(),
        "wall_seconds": round(seconds),
        "times": [read_json(folder / TIMES) for folder in folders],
    }
    write_page(out / PAGE, folders, found, facts, budget=budget, seed=config.seed)
    write_manifest(out, "demo", config=config.settings(), budget=to_dict(budget))


def machine() -> str:
    """What computed, in a few words."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"
