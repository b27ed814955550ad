"""`python -m benchmarks NAME... [--json FILE] [--device cuda] [--size NAME...] [--full]`: run benchmarks.

Figures are printed as they come; rounds are cut to end each benchmark within some minutes, which the rows then say.

Names: encode, bank, step, loader, loss, recall, beside. Peers come with `pip install 'llm2clip[bench]'`, but for
LLM2Vec, which asks for an old transformers: `pip install --no-deps llm2vec`. `scripts/gpu` runs those that have sizes
for a GPU, each within its own time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.device import CUT, facts
from benchmarks.rows import HEADER, line

SECONDS = 240.0
"""Of a benchmark, unless all of it is asked for."""
NAMES = ("encode", "bank", "step", "loader", "loss", "recall", "beside")


def main() -> None:
    """Run the named benchmarks one after another."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--json", type=Path, help="also write machine and rows to this file")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--size", nargs="+", help="of a benchmark that has several (tiny among them); default by device"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="of each benchmark; it takes fewer rounds to keep to it"
    )
    parser.add_argument(
        "--full", action="store_true", help="all rounds and sizes, however long: what RESULTS.md quotes"
    )
    parser.add_argument("--rows", type=Path, help="append each row to this file as a line of JSON, as it comes")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": facts(arguments.device)}
    print(result["machine"])
    for name in arguments.names:
        print(f"\n{name}\n{HEADER}", flush=True)
        result[name] = []
        until = None if arguments.full else time.monotonic() + arguments.seconds
        for row in rows_of(name, arguments.device, arguments.size, until):
            row = row | ({"rounds": CUT[0]} if CUT and row["value"] is not None else {})
            print(line(row), flush=True)
            result[name].append(row)
            if arguments.rows:
                with arguments.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def rows_of(name: str, device: str, sizes: list[str] | None, until: float | None) -> Iterable[dict[str, Any]]:
    """The rows of a benchmark; one without a table of sizes has one size, and its rows come together."""
    module = importlib.import_module(f"benchmarks.{name}")
    settings = getattr(module, "SETTINGS", None)
    if settings is None:
        return module.run(device, until)
    chosen = sizes or (module.GPU_SIZES if device.startswith("cuda") else ["cpu"])
    if unknown := [size for size in chosen if size not in settings]:
        raise SystemExit(f"--size is {unknown[0]!r}; {name} has {', '.join(settings)}")
    return module.run([settings[size] for size in chosen], device, until)


if __name__ == "__main__":
    main()
