"""`bank verify`: every checksum of a bank, its tables, and a sample of its vectors encoded again."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm2clip.artifacts import file_digest, indented_json
from llm2clip.bank.build import TEACHER
from llm2clip.bank.config import BankVerifyConfig
from llm2clip.bank.encoder import CaptionEncoder
from llm2clip.bank.hashes import as_hashes, digest, text_bytes
from llm2clip.bank.load import facts_of, load_for_encoding
from llm2clip.bank.reader import Bank, Table
from llm2clip.bank.reuse import check_same_teacher, find_teacher, teacher_of
from llm2clip.bank.vectors import checksum
from llm2clip.errors import ArtifactError, setting
from llm2clip.hub import pick_device
from llm2clip.progress import human_bytes, track

logger = logging.getLogger("llm2clip")
NO_TEACHER = "none"


def verify_bank(config: BankVerifyConfig) -> dict[str, Any]:
    """Verify a bank; prints and returns what was checked.

    Raises:
        ArtifactError: naming the damaged files, the broken table, or the caption whose vector is another.
        UsageError: if the teacher is not the bank's, naming both fingerprints.
    """
    bank = Bank.open(config.bank)
    report = {"folder": str(config.bank), **check_files(bank)}
    check_table(bank)
    if config.teacher != NO_TEACHER:
        report |= check_vectors(bank, config)
    sys.stdout.write(as_text(report) + "\n")
    return report


def check_files(bank: Bank) -> dict[str, Any]:
    """Compare every file, and of the vectors every shard, with the checksum in the manifest.

    Raises:
        ArtifactError: naming those that are missing or differ.
    """
    layout, tables = bank.layout, bank.manifest["table"]
    arrays = {name: layout.open(name) for name in layout.arrays}
    shards = list(enumerate(bank.manifest["shards"]))
    damaged = [name for name, entry in tables.items() if file_digest(bank.folder / name) != entry["sha256"]]
    for shard, facts in track(shards, description="verify", unit="shards", total=len(shards)):
        rows, path = layout.rows(shard), layout.facts_path(shard)
        found = {name: checksum(array[rows.start : rows.stop]) for name, array in arrays.items()}
        if found != facts["sha256"] or not _holds(path, facts):
            damaged.append(str(path.relative_to(bank.folder)))
    if not _holds(bank.folder / TEACHER, bank.manifest["teacher"]):
        damaged.append(TEACHER)
    if damaged:
        more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
        raise ArtifactError(
            f"{bank.folder}: damaged: {', '.join(damaged[:5])}{more}; delete these files and type the command that "
            "made the bank again: only they, and the vectors of these shards, are made anew"
        )
    paths = [*(bank.folder / name for name in tables), *map(layout.path, arrays)]
    return {"files": len(paths), "shards": len(shards), "bytes": sum(path.stat().st_size for path in paths)}


def _holds(path: Path, content: Any) -> bool:
    return path.exists() and path.read_bytes() == indented_json(content)


def check_table(table: Table) -> None:
    """Check that the columns fit together.

    Raises:
        ArtifactError: saying what does not.
    """
    starts: NDArray[np.int64] = table.caption_start
    rows: NDArray[np.int64] = table.caption_row
    problems = {
        "caption_start does not rise": bool((np.diff(starts) < 0).any()),
        "caption_start does not end with the captions": int(starts[-1]) != len(rows),
        "a caption's row does not exist": bool(len(rows)) and not 0 <= rows.min() <= rows.max() < table.num_rows,
        "a caption's kind does not exist": bool(len(rows)) and int(table.caption_kind.max()) >= len(table.kinds),
    }
    for problem, found in problems.items():
        if found:
            raise ArtifactError(f"{table.folder}: {problem}; delete its table folder and make the bank again")


def check_vectors(bank: Bank, config: BankVerifyConfig) -> dict[str, Any]:
    """Encode a sample of captions again and compare.

    Raises:
        ArtifactError: naming the caption whose vector differs most, if by more than `min_cosine` allows.
    """
    recorded = teacher_of(bank)
    prompt, precision = recorded.prompt, recorded.precision
    name, revision = find_teacher(bank, config.teacher)
    teacher = load_for_encoding(
        name,
        revision=revision,
        device=pick_device(config.device),
        precision=precision,
        trust_remote_code=config.trust_remote_code,
    )
    encoder = CaptionEncoder(teacher, prompt=prompt, dtype="float32")
    check_same_teacher(bank, facts_of(teacher, name, prompt=prompt, precision=precision, dim=encoder.dim))
    draw = np.random.default_rng(config.seed)
    rows = np.sort(draw.choice(bank.num_rows, min(config.sample, bank.num_rows), replace=False))
    texts = bank.texts(rows)
    if not np.array_equal(as_hashes([digest(text_bytes(text)) for text in texts]), bank.hashes[rows]):
        raise ArtifactError(f"{bank.folder}: hashes do not fit their texts; delete its table folder, make it again")
    again, _ = encoder.encode(texts)
    cosine = cosines(bank.vectors(rows).astype(np.float32), again)
    worst = int(cosine.argmin())
    if not cosine[worst] >= config.min_cosine:
        raise ArtifactError(
            f"{bank.folder}: the vector of row {rows[worst]} ({texts[worst][:60]!r}) has cosine {cosine[worst]:.5f} to "
            f"the one encoded now, below {setting('min_cosine')} {config.min_cosine}"
        )
    return {"sample": len(rows), "min_cosine": float(cosine.min()), "mean_cosine": float(cosine.mean())}


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """The cosine of each row of `a` `[N, T]` with that of `b`; that of two zero vectors is 1.

    >>> cosines(np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[4.0, 3.0], [0.0, 0.0]])).round(2).tolist()
    [0.96, 1.0]
    """
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products = (a * b).sum(1)
    both_zero = ~a.any(1) & ~b.any(1)
    cosine: NDArray[np.float32] = np.where(both_zero, 1.0, products / np.where(norms > 0, norms, 1.0))
    return cosine


def as_text(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [
        f"{report['folder']}: {report['files']} files and {report['shards']} shards whole "
        f"({human_bytes(report['bytes'])}), table consistent"
    ]
    if "sample" in report:
        lines.append(
            f"{report['sample']} captions encoded again: cosine at least {report['min_cosine']:.6f}, "
            f"mean {report['mean_cosine']:.6f}"
        )
    return "\n".join(lines)
