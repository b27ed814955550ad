"""The settings of `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip.config import PRECISIONS, check_choice, check_positive, to_dict
from llm2clip.data.config import SourceConfig
from llm2clip.errors import UsageError, setting
from llm2clip.eval.benchmarks import check_benchmarks

NO_BASELINE = "none"
SPEED_FIELDS = ("out", "root", "download", "list", "cache", "batch_size", "device")
"""Fields that do not decide the scores (beyond rounding)."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SourceConfig):
    """Score a model on images and captions: image to text and text to image R@1/5/10, and caption retrieval.

    With --teacher alone, any text encoder's captions are scored. Each --data is a dataset of its own with its own
    name and pool, but tars of one folder are one dataset. --benchmark NAME scores a named benchmark by its protocol.
    """

    data: tuple[str, ...] = ()
    """Sources, one or several, each a dataset: as elsewhere, paths, globs or brace ranges ending in .tar .csv .tsv
    .jsonl .json or .parquet; folders; hf:org/name[:split]; URLs of such files."""
    benchmark: tuple[str, ...] = ()
    """Named benchmarks, each scored as its protocol card says."""
    root: str | None = None
    """The folder of the benchmark's files, or the one that holds those of each benchmark under its name."""
    download: bool = False
    """First fetch what --root lacks, where the licence and plain addresses allow it: docci, xm3600, xm3600-first."""
    list: bool = False
    """Print the benchmarks there are, or the cards of those named, and do nothing else."""
    out: Path | None = None
    """Folder of report.json, report.md and report.html; made if it is not there."""
    model: str | None = None
    """The model: a student, an exported folder, a CLIP or SigLIP of transformers, or a SentenceTransformer that encodes
    images; a local folder or a Hub id. open_clip:NAME/WEIGHTS is one of open_clip, vectors:DIR vectors of a benchmark
    that lie in files. Without it the teacher alone is scored, on captions."""
    teacher: str | None = None
    """The student's teacher; or alone any text encoder: a teacher, an LLM, a SentenceTransformer; folder or Hub id."""
    model_revision: str | None = None
    """Branch, tag or commit of a Hub `model`."""
    teacher_revision: str | None = None
    """Branch, tag or commit of a Hub `teacher`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model or teacher. Only for sources you trust."""
    baseline: str | None = None
    """What the scores are compared with: any `model` that needs no teacher beside it (a text encoder where the teacher
    alone is scored); none for nothing. By default the CLIP or SigLIP that a student's tower is of, if it is here."""
    compare: tuple[str, ...] = ()
    """More models, each scored on the same and set beside the first in one table, with the differences; any `baseline`
    can be one."""
    cache: str | None = None
    """Folder where vectors are kept by the model that gave them: what was encoded once is not encoded again, whatever
    benchmark it is of. By default nothing is kept."""
    precision: str = "auto"
    """Arithmetic of the models: fp32, bf16, fp16, or auto: as their weights are saved, but fp32 for a half precision
    that this CPU would emulate."""
    batch_size: int = 64
    """Images or texts in a model at once."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; by default a GPU if there is one."""
    seed: int = 0
    """Which captions the page shows, and of more than 10,000 captions those that the similarity figures are of."""

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            UsageError: for an impossible value or combination.
        """
        super().__post_init__()
        check_choice(setting("precision"), self.precision, PRECISIONS)
        check_positive(batch_size=self.batch_size)
        check_benchmarks(self.benchmark, "" if self.list else self.root)
        if self.download and not self.benchmark:
            raise UsageError(f"{setting('download')} fetches what {setting('benchmark')} NAME takes; name one")
        if self.list:
            return
        if not (self.data or self.benchmark):
            raise UsageError(
                f"nothing to score on: give {setting('data', ('test.csv',))} or {setting('benchmark')} NAME"
            )
        if self.out is None:
            raise UsageError(f"there is no {setting('out', 'DIR')}: name the folder of the report")
        if self.model is None and self.teacher is None:
            raise UsageError(
                f"nothing to score: give {setting('model', 'DIR')}, and for a student {setting('teacher', 'DIR')}, or "
                f"{setting('teacher', 'DIR')} alone"
            )

    @property
    def needs_images(self) -> bool:
        """A text encoder alone is scored on captions; vectors that lie in files have seen their images."""
        models = [self.model, *self.compare, *([self.baseline] if self.baseline not in (None, NO_BASELINE) else [])]
        return self.model is not None and not all((name or "").startswith("vectors:") for name in models)

    def settings(self) -> dict[str, Any]:
        """The fields that decide what is written, JSON-ready."""
        return {key: value for key, value in to_dict(self).items() if key not in SPEED_FIELDS}
