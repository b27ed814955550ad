"""The settings of `export`, `convert` and `push`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from llm2clip.config import check_choice, to_dict
from llm2clip.errors import UsageError, setting
from llm2clip.export.format import find_format, format_names
from llm2clip.released import known_teacher


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a trained student as a folder that other programs load; it is loaded again and compared before it is done.

    sentence-transformers: one folder that encodes texts and images. transformers: the student alone, for AutoModel;
    texts need the teacher beside it. tower: the vision tower alone, in the format of its own family. onnx: the tower
    and the adaptor as graphs. open-clip: the image half, for open_clip.
    """

    model: str
    """The student: a folder made by train-student, or a Hub id."""
    to: str
    """sentence-transformers, transformers, tower, onnx (needs the extra onnx) or open-clip (extra metrics)."""
    out: Path
    """Folder to write; made if it is not there."""
    teacher: str | None = None
    """The teacher, folder or Hub id; needed for sentence-transformers, elsewhere only checked to be the student's."""
    report: Path | None = None
    """A report.json of evaluate, whose scores go into the model card."""
    model_revision: str | None = None
    """Branch, tag or commit of a Hub `model`."""
    teacher_revision: str | None = None
    """Branch, tag or commit of a Hub `teacher`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the teacher. Only for sources you trust."""
    device: str | None = None
    """Where the written folder is tried: cpu, cuda, ...; by default a GPU if there is one."""

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            UsageError: for an impossible value or combination.
        """
        check_choice(setting("to"), self.to, format_names())
        if find_format(self.to).needs_teacher and self.teacher is None and known_teacher(self.model) is None:
            raise UsageError(
                f"{setting('to', self.to)} puts the teacher into the folder: add {setting('teacher', 'DIR')}"
            )

    def settings(self) -> dict[str, Any]:
        """The fields that decide what is written, JSON-ready."""
        return {key: value for key, value in to_dict(self).items() if key not in ("out", "device")}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Write a student that the paper's authors released as a folder of llm2clip's own, with all its weights.

    Every verb opens it without that, too. The folder is read without pickles, and says what it was made of.
    """

    model: Positional[str]
    """The released student: a Hub id (microsoft/LLM2CLIP-Openai-L-14-336, say), or the folder of a download."""
    out: Path
    """Folder to write; made if it is not there."""
    model_revision: str | None = None
    """Branch, tag or commit of a Hub id."""

    def settings(self) -> dict[str, Any]:
        """The fields that decide what is written, JSON-ready."""
        return {key: value for key, value in to_dict(self).items() if key != "out"}


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Put an exported folder, or a teacher, onto the Hub, with a model card filled from its manifest.

    The card has the folder's name there in its code, what it was made of, scores if it was exported with some, and the
    licences of its parts, as far as their own cards state them.
    """

    folder: Positional[Path]
    """The folder that export, train-teacher or join-teachers made."""
    name: Positional[str]
    """Its name on the Hub, org/name; made if it is not there."""
    private: bool = False
    """Let nobody else read it."""

    def __post_init__(self) -> None:
        """Check what can be checked without asking the Hub.

        Raises:
            UsageError: for a name that can be none.
        """
        if self.name.count("/") != 1 or not all(self.name.split("/")):
            raise UsageError(f"{setting('name')} {self.name} is no name on the Hub; give org/name")
