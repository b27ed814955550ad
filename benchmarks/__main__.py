"""`python -m benchmarks NAME... [--json FILE] [--device cuda]`: run benchmarks, print their table, write it.

Names: encode, bank, step, loader, loss, recall. Peers come with `pip install 'llm2clip[bench]'`, but for
LLM2Vec, which asks for an old transformers: `pip install --no-deps llm2vec`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from pathlib import Path

NAMES = ("encode", "bank", "step", "loader", "loss", "recall")


def machine(device: str) -> dict[str, object]:
    """What the figures were measured on."""
    import torch
    import transformers

    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """The CPU's name as Linux gives it."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.processor()


def main() -> None:
    """Run the named benchmarks one after another."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--json", type=Path, help="also write machine and rows to this file")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    arguments = parser.parse_args()
    result: dict[str, object] = {"machine": machine(arguments.device)}
    print(result["machine"])
    for name in arguments.names:
        rows = importlib.import_module(f"benchmarks.{name}").run(arguments.device)
        result[name] = rows
        print(f"\n{name}\n{table(rows)}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def table(rows: list[dict]) -> str:
    """Rows {name, value, unit, ratio, against} as a Markdown table."""
    lines = ["| what | value | ratio | against |", "|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.get("ratio") is None else f"{row['ratio']:.3f}"
        lines.append(f"| {row['name']} | {row['value']:,.4g} {row['unit']} | {ratio} | {row.get('against') or ''} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
