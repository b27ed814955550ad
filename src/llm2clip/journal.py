"""What a training says of itself: a progress line, `log.jsonl`, curves in a tracker, a stop when the loss is no number.

Values stay on the device until `FLUSH_EVERY` steps are together, so that logging does not make the device wait; only
for some of the first, so that it is soon known how long all will take.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.artifacts import atomic_path, json_bytes
from llm2clip.errors import LLM2CLIPError, UsageError, setting
from llm2clip.progress import Progress

logger = logging.getLogger("llm2clip")
LOG = "log.jsonl"
FLUSH_EVERY = 10
FLUSH_EARLY = (1, 3, 5)
"""Steps from the start after which the values are taken from the device at once."""


class Journal:
    """Collects the values of each step; all processes hold one, the main process writes.

    Args:
        accelerator: of the run; knows the trackers.
        out: the folder that is being made.
        total: steps in all.
        step: steps done by an earlier run; what the log says of later ones is dropped.
        images: images a step, over all processes, for the rate of what is added; 0 for texts alone.
        file: the log's name in `out`.
        description: what the progress line calls the training.
        digits: significant digits of a number in the log; 7 are those of float32, 17 all that Python has.
        estimate: what the training takes besides time, see `Progress`.
    """

    def __init__(
        self,
        accelerator: Any,
        out: Path,
        *,
        total: int,
        step: int,
        images: int = 0,
        file: str = LOG,
        description: str = "train student",
        digits: int = 7,
        estimate: Callable[[], str] | None = None,
    ) -> None:
        self._accelerator, self._out, self._file = accelerator, out, file
        self._images, self._digits, self._first = images, digits, step
        self._waiting: list[tuple[int, dict[str, Tensor]]] = []
        self._last_flush = time.monotonic()
        self._progress: Progress | None = None
        self._note = ""
        if accelerator.is_main_process:
            _keep_until(out / file, step)
            self._progress = Progress(
                total, description=description, unit="steps", initial=step, estimate=estimate
            ).__enter__()

    def add(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Note the values of a finished step (from 1).

        Raises:
            LLM2CLIPError: if one of the last steps had a loss or gradient that is no number.
        """
        self._waiting.append((step, {name: torch.as_tensor(value) for name, value in values.items()}))
        taken = step - self._first
        if taken in FLUSH_EARLY or taken % FLUSH_EVERY == 0:
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
        rate = self._images * len(self._waiting) / max(now - self._last_flush, 1e-9)
        lines = [
            {"step": step, **dict(zip(names, row, strict=True)), "images_per_second": rate}
            for (step, _), row in zip(self._waiting, table.tolist(), strict=True)
        ]
        self._waiting, self._last_flush = [], now
        self._write(lines)
        self.advance(lines[-1]["step"])

    def note(self, step: int, values: Mapping[str, Any]) -> None:
        """Write values that are at hand, scores or what a trainer took together, as a line of their own.

        Raises:
            LLM2CLIPError: if there is a loss or gradient among them that is no number.
        """
        self.flush()
        self._write([{"step": step, **values}])

    def advance(self, step: int) -> None:
        """Have the progress line stand at `step`, behind it the last values written."""
        if self._progress is not None:
            self._progress.advance(step - self._progress.done, note=self._note)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        """Write the lines up to the first with a loss or gradient that is no number, which ends the run."""
        # A scaler for fp16 skips the step where a gradient is no number; anyone else's weights are lost by it.
        watched = ["loss"] if self._accelerator.scaler is not None else ["loss", "grad_norm"]
        bad = [(i, name) for i, line in enumerate(lines) for name in watched if not math.isfinite(line.get(name, 0.0))]
        good = lines[: bad[0][0]] if bad else lines
        if self._accelerator.is_main_process:
            with (self._out / self._file).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(_round(line, self._digits)) + "\n" for line in good)
            for line in good:
                values = {name: value for name, value in line.items() if name != "step"}
                self._accelerator.log(values, step=line["step"])
                self._note = _shown(line) or self._note
        if bad:
            line, name = lines[bad[0][0]], bad[0][1]
            raise LLM2CLIPError(
                f"the {name.replace('grad_', 'gradient ')} is {line[name]} at step {line['step']}; checkpoints of "
                f"earlier steps are kept in {self._out}: lower {setting('learning_rate')}, add "
                f"{setting('warmup_steps')} or take {setting('precision', 'fp32')}, in a new {setting('out')}"
            )

    def close(self) -> None:
        """Write what waits, end the progress line and the trackers."""
        self.flush()
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
        for tracker in self._accelerator.trackers:
            tracker.finish()


def logged(path: Path, name: str) -> list[dict[str, float]]:
    """The lines of a log, `log.jsonl` in an artifact's folder, that have a value of this name; none without a log."""
    if not path.is_file():
        return []
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line.get(name) is not None]


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
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{text}\n" for text in kept), encoding="utf-8")


def _shown(line: Mapping[str, Any]) -> str:
    """What of a line the progress shows."""
    shown = [f"{name} {line[name]:.4g}" for name in ("loss", "accuracy", "scale") if name in line]
    rate = [f"{line['images_per_second']:,.0f} images/s"] if "images_per_second" in line else []
    return ", ".join(filter(None, [" ".join(shown), *rate]))


def _round(line: Mapping[str, Any], digits: int) -> dict[str, Any]:
    """The line with so many digits a number, and null for what JSON cannot say (a gradient norm of inf, in fp16)."""
    return {
        name: (float(f"{value:.{digits}g}") if math.isfinite(value) else None) if isinstance(value, float) else value
        for name, value in line.items()
    }
