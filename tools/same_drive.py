"""Runs rows of `scripts/same` with one checkout, in one process: `same_drive.py fields`, `same_drive.py ROWS.json`.

Knows that checkout by its public face alone: `python -m llm2clip`, `llm2clip.LLM2CLIP`, and that tyro parses its flags.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import io
import json
import os
import re
import runpy
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROW_SECONDS = 600
MARK = "the fields:"


def fields() -> dict[str, dict[str, str]]:
    """Verb -> field -> default as text, of every verb that `llm2clip --help` lists."""
    import tyro

    found: list[type] = []

    def catch(cls: type, *args: Any, **kwargs: Any) -> None:
        found.append(cls)
        raise KeyboardInterrupt  # the command line ends quietly

    tyro.cli = catch  # type: ignore[assignment]
    overview = io.StringIO()
    with contextlib.redirect_stdout(overview):
        command(["--help"])
    table = {}
    for verb in re.findall(r"^ {2,4}([a-z][a-z-]*(?: [a-z-]+)?) {2,}\S", overview.getvalue(), re.MULTILINE):
        found.clear()
        with contextlib.redirect_stderr(io.StringIO()):
            command(verb.split())
        config = [field for cls in found for field in settings_of(cls)]  # none for a verb without flags
        table[verb] = {field.name: default(field) for field in config if field.init}
    return table


def settings_of(cls: type) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass, or of those in its fields, where they are shown in groups."""
    found = []
    for field in dataclasses.fields(cls):
        found += settings_of(field.type) if dataclasses.is_dataclass(field.type) else [field]  # type: ignore[arg-type]
    return found


def default(field: dataclasses.Field[Any]) -> str:
    """The default of a field as text."""
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else repr(field.default)


def command(words: list[str]) -> int:
    """Run `python -m llm2clip WORDS` in this process; returns its exit code."""
    sys.argv = ["llm2clip", *words]
    try:
        runpy.run_module("llm2clip", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 130
    return 0


def encode(model: str, teacher: str, images: str, _: str, out: str) -> int:
    """What the public `LLM2CLIP` makes of images and texts, as `vectors.safetensors`."""
    import torch
    from safetensors.torch import save_file

    from llm2clip import LLM2CLIP

    opened = LLM2CLIP.from_pretrained(model, teacher=None if teacher == "-" else teacher)
    image = opened.encode_image(sorted(map(str, Path(images).glob("0*.jpg")))[:6])
    text = opened.encode_text(["a small red disc", "this image shows a large blue square .", "near"])
    Path(out).mkdir(parents=True)
    vectors = {"image": torch.as_tensor(image).contiguous(), "text": torch.as_tensor(text).contiguous()}
    save_file(vectors, Path(out) / "vectors.safetensors")
    return 0


def run(row: dict[str, Any]) -> dict[str, Any]:
    """Run one row; returns its exit code, what it printed and its last line on stderr."""
    log = Path(".logs") / (row["name"].replace("/", "+") + ".txt")
    start = time.monotonic()
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with log.open("w+") as errors, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            code = encode(*row["argv"][1:]) if row["argv"][0] == "encode" else command(row["argv"])
        except Exception:  # noqa: BLE001 - the row failed; the others go on
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        errors.seek(0)
        last = [line.strip() for line in errors if line.strip()][-1:]
    printed.seek(0)
    seconds = round(time.monotonic() - start, 2)
    return {"name": row["name"], "seconds": seconds, "code": code, "stdout": printed.read(), "stderr": "".join(last)}


def main() -> None:
    """Print the fields, or run the rows of a file and note each as it ends."""
    import llm2clip

    if not str(llm2clip.__file__).startswith(os.environ["SAME_CHECKOUT"]):
        sys.exit(f"llm2clip was imported from {llm2clip.__file__}, not from {os.environ['SAME_CHECKOUT']}")
    if sys.argv[1] == "fields":
        table = fields()
        sys.stdout.write(f"{MARK}{json.dumps(table)}\n")
        return
    plan = json.loads(Path(sys.argv[1]).read_text())
    Path(".logs").mkdir(exist_ok=True)
    with Path("results.jsonl").open("a") as results:
        for row in plan:
            faulthandler.dump_traceback_later(ROW_SECONDS, exit=True)
            results.write(json.dumps(run(row)) + "\n")
            results.flush()


if __name__ == "__main__":
    main()
