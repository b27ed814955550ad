"""The settings of `build-bank` and of the `bank` tools."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from llm2clip.bank.dtypes import DTYPES
from llm2clip.config import PRECISIONS, check_choice, check_positive, to_dict
from llm2clip.data.config import SourceConfig
from llm2clip.errors import UsageError, setting
from llm2clip.eval.benchmarks import check_benchmarks

SPEED_FIELDS = ("out", "reuse", "shard", "device", "batch_tokens", "compile")
"""Fields that do not decide what is written (beyond rounding), so a run may go on with other values of them."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How captions are encoded; shared by `build-bank` and `bank add`."""

    precision: str = "auto"
    """Arithmetic of the teacher: bf16, fp32, fp16, or auto (bf16 where the hardware has it)."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; by default a GPU if there is one (under torchrun, that of the local rank)."""
    batch_tokens: int | None = None
    """Tokens encoded at once, padding included; by default 16,384 on a GPU and 1,024 on a CPU."""
    compile: bool = False
    """Compile the teacher with torch.compile: a minute of waiting at the start, worth it for long runs on a GPU."""
    shard: str | None = None
    """i/n: encode only every n-th shard, from the i-th (0-based), as one of n jobs that need not talk to each other."""
    teacher_revision: str | None = None
    """Branch, tag or commit of a Hub `teacher`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the teacher. Only for sources you trust."""

    def check_encoding(self) -> None:
        """Check these fields.

        Raises:
            UsageError: for an impossible value.
        """
        check_choice(setting("precision"), self.precision, PRECISIONS)
        if self.batch_tokens is not None:
            check_positive(batch_tokens=self.batch_tokens)
        self.part()

    def settings(self) -> dict[str, Any]:
        """The fields that decide what is written, JSON-ready."""
        return {key: value for key, value in to_dict(self).items() if key not in SPEED_FIELDS}

    def part(self) -> tuple[int, int]:
        """`--shard` as numbers; (0, 1) without it.

        Raises:
            UsageError: if it is not of the form i/n with i below n.
        """
        if self.shard is None:
            return 0, 1
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if not match or int(match[1]) >= int(match[2]):
            raise UsageError(f"{setting('shard')} is {self.shard!r}; write i/n with i from 0 to n-1, for example 0/8")
        return int(match[1]), int(match[2])


@dataclass(frozen=True, kw_only=True)
class BankConfig(EncodeConfig, SourceConfig):
    """Encode every distinct caption of the sources once, with the teacher; a killed run goes on where it stopped."""

    data: tuple[str, ...] = ()
    """Sources, one or several: as elsewhere, paths, globs or brace ranges ending in .tar .csv .tsv .jsonl .json
    .parquet or .arrow; folders; hf:org/name[:split]; URLs of such files."""
    benchmark: tuple[str, ...] = ()
    """In place of --data, named benchmarks (see evaluate --list): all texts that they ask a model for, for
    train-student --val."""
    root: str | None = None
    """The folder of the benchmark's files, or the one that holds those of each benchmark under its name."""
    teacher: str
    """The teacher: a folder made by train-teacher, an LLM, or any SentenceTransformer; a local folder or a Hub id."""
    out: Path
    """Folder of the bank; made if it is not there."""
    text_only: bool = False
    """Read captions alone, from sources with or without images (a .txt holds one a line): for train-student
    --inherit-bank."""
    prompt: str | None = None
    """Text put before every caption; by default the teacher's own default prompt, if it has one."""
    prompt_name: str | None = None
    """Name of one of the teacher's own prompts ("query", "document"), instead of `--prompt`."""
    dtype: str = "float16"
    """How vectors are stored: float16, float32, bfloat16, or int8 (half of float16; a scale for each 64 dimensions)."""
    shard_rows: int = 32768
    """Captions encoded between two saves; at most so many per process are lost when a run is killed."""
    reuse: tuple[Path, ...] = ()
    """Other banks of the same teacher, prompt and precision; captions found in them are copied, not encoded."""

    @property
    def needs_images(self) -> bool:
        """Whether the images are read, too, and not the captions alone."""
        return not (self.text_only or self.benchmark)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_encoding()
        check_choice(setting("dtype"), self.dtype, DTYPES)
        check_positive(shard_rows=self.shard_rows)
        check_benchmarks(self.benchmark, self.root)
        if bool(self.data) == bool(self.benchmark):
            said = "both are given; leave one out" if self.data else "neither is given"
            raise UsageError(
                f"a bank is of {setting('data', ('train.csv',))} or of {setting('benchmark')} NAME: {said}"
            )
        if self.benchmark and (self.captions or self.views):
            name = "captions" if self.captions else "views"
            raise UsageError(
                f"{setting(name)} is about sources; a benchmark says itself what it asks for: leave it out"
            )
        if self.prompt is not None and self.prompt_name is not None:
            raise UsageError(
                f"{setting('prompt')} {self.prompt!r} and {setting('prompt_name')} {self.prompt_name}: give one of "
                "the two"
            )


@dataclass(frozen=True, kw_only=True)
class BankAddConfig(EncodeConfig, SourceConfig):
    """A new bank: an existing one plus the captions of further sources; only captions it does not hold are encoded.

    Captions of an image the bank knows (same file and place) join its sample, so a new kind of caption is added by
    giving the same images with another `--captions`. Vectors that are there are copied.
    """

    bank: Positional[Path]
    """The existing bank."""
    out: Path
    """Folder of the new bank."""
    teacher: str | None = None
    """The teacher that made the bank; by default the path or id that the bank was built with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_encoding()


@dataclass(frozen=True, kw_only=True)
class BankMergeConfig:
    """One bank out of several by the same teacher: their samples one after another, equal captions stored once.

    Captions of the same image (same file and place) become one sample. Nothing is encoded.
    """

    banks: Positional[tuple[Path, ...]]
    """The banks, two or more."""
    out: Path
    """Folder of the new bank."""

    def __post_init__(self) -> None:
        if len(self.banks) < 2:
            raise UsageError(f"bank merge names {len(self.banks)}; give two or more to merge")

    def settings(self) -> dict[str, Any]:
        """The fields that decide what is written, JSON-ready."""
        return {"banks": [str(bank) for bank in self.banks]}


@dataclass(frozen=True, kw_only=True)
class BankInfoConfig:
    """What a bank holds: counts by kind, lengths in tokens, sources, sizes, teacher."""

    bank: Positional[Path]
    """The bank."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True, kw_only=True)
class BankVerifyConfig:
    """Read every checksum of a bank, check its tables, and encode a sample of its captions again to compare."""

    bank: Positional[Path]
    """The bank."""
    teacher: str | None = None
    """The teacher, if it no longer lies where it did when the bank was built; "none" to skip encoding."""
    sample: int = 64
    """Captions encoded again."""
    min_cosine: float = 0.999
    """Least cosine between a stored vector and the one encoded again."""
    device: str | None = None
    """cpu, cuda, ...; by default a GPU if there is one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the teacher. Only for sources you trust."""
    seed: int = 0
    """Which captions are drawn."""

    def __post_init__(self) -> None:
        check_positive(sample=self.sample)
        if not 0 < self.min_cosine <= 1:
            raise UsageError(f"{setting('min_cosine')} is {self.min_cosine}; it must be in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class BankExportConfig:
    """A bank's captions and vectors for other programs as Parquet files, one row a caption.

    `datasets.load_dataset("parquet", data_dir=OUT)` reads them.
    """

    bank: Positional[Path]
    """The bank."""
    out: Path
    """Folder to write: new, empty, or begun by this same export, which then goes on where it stopped."""
    rows_per_file: int = 65536
    """Captions in one file."""
    kinds: tuple[str, ...] = ()
    """Only captions of these kinds; by default all."""

    def __post_init__(self) -> None:
        check_positive(rows_per_file=self.rows_per_file)
