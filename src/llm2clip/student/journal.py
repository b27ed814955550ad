"""What a run says of itself: a progress line, `log.jsonl`, curves in a tracker, and a stop when the loss is no number.

Values stay on the device until `FLUSH_EVERY` steps are together, so that logging never makes the device wait.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.artifacts import json_bytes
from llm2clip.errors import LLM2CLIPError, UsageError, setting
from llm2clip.progress import Progress

logger = logging.getLogger("llm2clip")
LOG = "log.jsonl"
FLUSH_EVERY = 10


class Journal:
    """Collects the values of each step; all processes hold one, the main process writes.

    Args:
        accelerator: of the run; knows the trackers.
        out: the student's folder.
        total: steps in all.
        step: steps done by an earlier run; what `log.jsonl` says of later ones is dropped.
        pictures: pictures a step, over all processes.
    """

    def __init__(self, accelerator: Any, out: Path, *, total: int, step: int, pictures: int) -> None:
        self._accelerator, self._out, self._pictures = accelerator, out, pictures
        self._waiting: list[tuple[int, dict[str, Tensor]]] = []
        self._last_flush = time.monotonic()
        if accelerator.is_main_process:
            _keep_until(out / LOG, step)
        self.progress = Progress(total, description="train student", unit="steps", initial=step)

    def add(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Note the values of a finished step (from 1).

        Raises:
            LLM2CLIPError: if one of the last steps had a loss or gradient that is no number.
        """
        self._waiting.append((step, {name: torch.as_tensor(value) for name, value in values.items()}))
        if len(self._waiting) >= FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            LLM2CLIPError: if a loss or gradient among it is no number.
        """
        if not self._waiting:
            return
        names = list(self._waiting[0][1])
        table = torch.stack([torch.stack([row[n].detach().float().cpu() for n in names]) for _, row in self._waiting])
        now = time.monotonic()
        rate = self._pictures * len(self._waiting) / max(now - self._last_flush, 1e-9)
        lines = [
            {"step": step, **dict(zip(names, row, strict=True)), "pictures_per_second": rate}
            for (step, _), row in zip(self._waiting, table.tolist(), strict=True)
        ]
        count, self._waiting, self._last_flush = len(self._waiting), [], now
        # A scaler for fp16 skips the step where a gradient is no number; anyone else's weights are lost by it.
        watched = ["loss"] if self._accelerator.scaler is not None else ["loss", "grad_norm"]
        bad = [(i, name) for i, line in enumerate(lines) for name in watched if not math.isfinite(line.get(name, 0.0))]
        self._write(lines[: bad[0][0]] if bad else lines)
        if bad:
            line, name = lines[bad[0][0]], bad[0][1]
            raise LLM2CLIPError(
                f"the {name.replace('grad_', 'gradient ')} is {line[name]} at step {line['step']}; checkpoints of "
                f"earlier steps are kept in {self._out}: lower {setting('learning_rate')}, add "
                f"{setting('warmup_steps')} or take {setting('precision', 'fp32')}, in a new {setting('out')}"
            )
        if self._accelerator.is_main_process:
            last = lines[-1]
            note = " ".join(f"{name} {last[name]:.4g}" for name in ("loss", "accuracy", "scale") if name in last)
            self.progress.advance(count, note=f"{note}, {rate:,.0f} pictures/s")

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Write other values of a step, such as scores, as a line of their own."""
        self.flush()
        self._write([{"step": step, **values}])

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if not self._accelerator.is_main_process:
            return
        with (self._out / LOG).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(_round(line)) + "\n" for line in lines)
        for line in lines:
            values = {name: value for name, value in line.items() if name != "step"}
            self._accelerator.log(values, step=line["step"])

    def close(self) -> None:
        """Write what waits, end the progress line and the trackers."""
        self.flush()
        self.progress.__exit__(None, None, None)
        for tracker in self._accelerator.trackers:
            tracker.finish()


def find_tracker(name: str) -> list[str]:
    """The tracker for `--tracker name`, as accelerate calls it.

    Raises:
        UsageError: if its package is not installed.
    """
    if name == "auto":
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    if name == "none":
        return []
    if not importlib.util.find_spec(name):
        raise UsageError(
            f"{setting('tracker')} {name} needs its package: pip install {name}, or use {setting('tracker', 'none')}"
        )
    return [name]


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: numbers, texts, flags; what has parts as the text of its JSON.

    >>> flat({"steps": 9, "mix": {"short": 1.0}, "epochs": None})
    {'steps': 9, 'mix': '{"short": 1.0}', 'epochs': None}
    """
    texts = {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
        for name, value in settings.items()
    }
    return {name: json_bytes(text).decode() if isinstance(text, str) else text for name, text in texts.items()}


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which the run does again, and a line torn by a kill."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["step"] <= step:
            kept.append(text)
    path.write_text("".join(f"{text}\n" for text in kept), encoding="utf-8")


def _round(line: dict[str, Any]) -> dict[str, Any]:
    """The line with seven digits a number, and null for what JSON cannot say (a gradient norm of inf, in fp16)."""
    return {
        name: (float(f"{value:.7g}") if math.isfinite(value) else None) if isinstance(value, float) else value
        for name, value in line.items()
    }
