"""`bank export`: captions, images' places and vectors for other programs, one row a caption."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.artifacts import atomic_path, is_complete, one_line_disk_errors, open_output, write_manifest
from llm2clip.bank.config import BankExportConfig
from llm2clip.bank.reader import Bank
from llm2clip.config import check_choice, to_dict
from llm2clip.errors import setting
from llm2clip.progress import Progress


def export_bank(config: BankExportConfig) -> Path:
    """Write the captions and vectors of a bank to a new folder, and return it; goes on where it stopped.

    Columns: `id`, `path`, `offset`, `length`, `column` (of the image), `kind`, `caption`, `vector`.

    Raises:
        UsageError: if the folder is in use, or a kind is unknown.
    """
    bank, out = Bank.open(config.bank), Path(config.out)
    for kind in config.kinds:
        check_choice(setting("kinds"), kind, bank.kinds)
    settings = {key: value for key, value in to_dict(config).items() if key != "out"}
    identity = {**settings, "bank_fingerprint": bank.fingerprint}
    with one_line_disk_errors(out), open_output(out, "bank-export", config=identity):
        if is_complete(out):
            return out
        write_manifest(
            out,
            "bank-export",
            config=settings,
            bank_fingerprint=bank.fingerprint,
            teacher_fingerprint=bank.teacher_fingerprint,
            dim=bank.dim,
            files=write_parquet(bank, out, config),
        )
    return out


def write_parquet(bank: Bank, out: Path, config: BankExportConfig) -> list[str]:
    """`data/train-00000-of-00007.parquet` and so on, as `datasets.load_dataset(folder)` looks for them."""
    (out / "data").mkdir(exist_ok=True)
    names = []
    for i, count, block in _blocks(bank, config):
        names.append(f"data/train-{i:05d}-of-{count:05d}.parquet")
        if not (out / names[-1]).exists():
            with atomic_path(out / names[-1]) as temporary:
                pq.write_table(rows_of(bank, block, config.kinds), temporary, use_dictionary=["path", "column", "kind"])
    return names


def rows_of(bank: Bank, captions: range, kinds: tuple[str, ...]) -> pa.Table:
    """The given captions (numbered through the bank), less those of other kinds, as an Arrow table."""
    numbers = np.arange(captions.start, captions.stop)
    codes = bank.caption_kind[captions.start : captions.stop]
    if kinds:
        wanted = np.isin(codes, [bank.kinds.index(kind) for kind in kinds])
        numbers, codes = numbers[wanted], codes[wanted]
    samples = np.searchsorted(bank.caption_start, numbers, side="right") - 1
    rows = bank.caption_row[numbers]
    images = [bank.image(int(sample)) for sample in samples]
    return pa.table(
        {
            "id": pa.array([bank.sample_id(int(sample)) for sample in samples], pa.string()),
            "path": pa.array([_as_utf8(image.path) for image in images], pa.string()),
            "offset": pa.array([image.offset for image in images], pa.int64()),
            "length": pa.array([image.length for image in images], pa.int64()),
            "column": pa.array([image.column for image in images], pa.string()),
            "kind": pa.array([bank.kinds[code] for code in codes], pa.string()),
            "caption": pa.array(bank.texts(rows), pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(bank.vectors(rows).reshape(-1)), bank.dim),
        }
    )


def _as_utf8(path: str) -> str:
    r"""A path as Arrow can hold it: bytes of a file name that is no UTF-8 as \xe9."""
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")


def _blocks(bank: Bank, config: BankExportConfig) -> Iterator[tuple[int, int, range]]:
    """File number, number of files, and the captions in the file; progress is shown."""
    total = len(bank.caption_row)
    count = max(1, -(-total // config.rows_per_file))
    with Progress(total, description="export", unit="captions") as progress:
        for i in range(count):
            block = range(i * config.rows_per_file, min((i + 1) * config.rows_per_file, total))
            yield i, count, block
            progress.advance(len(block))
