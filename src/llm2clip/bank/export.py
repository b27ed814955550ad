"""`bank export`: captions, pictures' places and vectors for other programs, one row a caption."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.artifacts import atomic_path, fingerprint, is_complete, open_output, write_json, write_manifest
from llm2clip.bank.config import BankExportConfig
from llm2clip.bank.files import one_line_disk_errors
from llm2clip.bank.reader import Bank
from llm2clip.compat import datasets_state
from llm2clip.config import check_choice, to_dict
from llm2clip.errors import setting
from llm2clip.progress import Progress


def export_bank(config: BankExportConfig) -> Path:
    """Write the captions and vectors of a bank to a new folder, and return it; goes on where it stopped.

    Columns: `id`, `path`, `offset`, `length`, `column` (of the picture), `kind`, `caption`, `vector`.

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
        names = write_parquet(bank, out, config) if config.to == "parquet" else write_datasets(bank, out, config)
        write_manifest(
            out,
            "bank-export",
            config=settings,
            bank_fingerprint=bank.fingerprint,
            teacher_fingerprint=bank.teacher_fingerprint,
            dim=bank.dim,
            files=names,
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


def write_datasets(bank: Bank, out: Path, config: BankExportConfig) -> list[str]:
    """Arrow files with the two JSON files that `datasets.load_from_disk` reads."""
    from datasets import DatasetInfo, Features

    names = []
    schema = None
    for i, count, block in _blocks(bank, config):
        names.append(f"data-{i:05d}-of-{count:05d}.arrow")
        if schema is None or not (out / names[-1]).exists():
            table = rows_of(bank, block, config.kinds)
            schema = table.schema
            with atomic_path(out / names[-1]) as temporary:
                _write_arrow(table, temporary)
    info = DatasetInfo(features=Features.from_arrow_schema(schema))
    info.write_to_directory(str(out))
    write_json(out / "state.json", datasets_state(names, fingerprint([bank.fingerprint, list(config.kinds)])))
    return names


def _write_arrow(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def rows_of(bank: Bank, captions: range, kinds: tuple[str, ...]) -> pa.Table:
    """The given captions (numbered through the bank), less those of other kinds, as an Arrow table."""
    table = bank.table
    numbers = np.arange(captions.start, captions.stop)
    codes = np.asarray(table.caption_kind[captions.start : captions.stop])
    if kinds:
        wanted = np.isin(codes, [bank.kinds.index(kind) for kind in kinds])
        numbers, codes = numbers[wanted], codes[wanted]
    samples = np.searchsorted(table.caption_start, numbers, side="right") - 1
    rows = np.asarray(table.caption_row)[numbers]
    pictures = [table.picture(int(sample)) for sample in samples]
    vectors = bank.vectors(rows)
    return pa.table(
        {
            "id": pa.array([table.sample_id(int(sample)) for sample in samples], pa.string()),
            "path": pa.array([_as_utf8(picture.path) for picture in pictures], pa.string()),
            "offset": pa.array([picture.offset for picture in pictures], pa.int64()),
            "length": pa.array([picture.length for picture in pictures], pa.int64()),
            "column": pa.array([picture.column for picture in pictures], pa.string()),
            "kind": pa.array([bank.kinds[code] for code in codes], pa.string()),
            "caption": pa.array(table.texts(rows), pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), bank.dim),
        }
    )


def _as_utf8(path: str) -> str:
    r"""A path as Arrow can hold it: bytes of a file name that is no UTF-8 as \xe9."""
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")


def _blocks(bank: Bank, config: BankExportConfig) -> Iterator[tuple[int, int, range]]:
    """File number, number of files, and the captions in the file; progress is shown."""
    total = len(bank.table.caption_row)
    count = max(1, -(-total // config.rows_per_file))
    with Progress(total, description="export", unit="captions") as progress:
        for i in range(count):
            block = range(i * config.rows_per_file, min((i + 1) * config.rows_per_file, total))
            yield i, count, block
            progress.advance(len(block))
