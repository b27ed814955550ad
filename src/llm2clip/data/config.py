"""The flags that every stage reading images and captions shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llm2clip.config import Columns, Views, check_choice
from llm2clip.data.columns import USUAL_KINDS
from llm2clip.data.views import VIEWS, views_of
from llm2clip.errors import UsageError, setting

TEXT_LINES = ("auto", "one")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where images and captions come from.

    Example:
        >>> SourceConfig(data=("shards/{00000..00012}.tar",), captions={"long": "dense_caption"}).max_bad_fraction
        0.05
    """

    data: tuple[str, ...]
    """Sources, one or several: a path, glob or brace range ({00000..00012}) ending in .tar .csv .tsv .jsonl .json
    .parquet or .arrow; a folder (of such tars, of images with metadata.csv or .txt files, saved by datasets);
    hf:org/name[:split]; or a URL of such files (hf:// s3:// https://)."""

    captions: Columns = field(default_factory=dict)
    """Which column holds the captions of which kind: short=caption long=dense_caption. A kind may take several columns
    (raw=caption_0,caption_1). Columns of JSON files inside tars count too. Usual names are recognised without it."""

    views: Views = field(default_factory=dict)
    """Further kinds made of a kind's captions: rest (all sentences but the first) and sample (some of these, at least
    one and not all): long=rest,sample adds the kinds long-rest and long-sample. After DeBias-CLIP; by default none."""

    image: str | None = None
    """Column that holds the image (a path, or embedded bytes); in a tar, its extension. Usual names are known."""

    image_root: str | None = None
    """Folder that relative paths of images in a table are looked up in; by default the table's own."""

    split: str | None = None
    """Of a source with several splits the one to read: rows of a table whose column "split" says so, the folder of that
    name below a folder, the split of a dataset of the Hub or of save_to_disk. By default train where it is such a
    dataset, and all rows of a table (the log says of which splits)."""

    text_lines: str = "auto"
    """What a .txt beside an image, or in a tar, holds: one (a caption, whatever its lines), or auto (a caption a line;
    one in all if an empty line parts paragraphs)."""

    allow_outside: bool = False
    """Let a table name images outside its own folder."""

    max_bad_fraction: float = 0.05
    """Share (0..1) of bad samples (unreadable image, no caption) skipped and counted; more stop the run."""

    revision: str | None = None
    """Commit, branch or tag of a Hub id (hf:org/name)."""

    @property
    def needs_images(self) -> bool:
        """Whether the images are read, too, and not the captions alone."""
        return True

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            UsageError: for an impossible value.
        """
        if isinstance(self.data, str) or not all(isinstance(spec, str) and spec.strip() for spec in self.data):
            raise UsageError(f"{setting('data')} is {self.data!r}; give paths, as in {setting('data', ('a.csv',))}")
        if not isinstance(self.captions, Mapping):
            example = setting("captions", {"short": "caption"})
            raise UsageError(f"{setting('captions')} is {self.captions!r}; give each kind its column, as in {example}")
        self._check_views()
        check_choice(setting("text_lines"), self.text_lines, TEXT_LINES)
        if not 0 <= self.max_bad_fraction <= 1:
            raise UsageError(f"{setting('max_bad_fraction')} is {self.max_bad_fraction}; it is a share between 0 and 1")

    def _check_views(self) -> None:
        if not isinstance(self.views, Mapping):
            example = setting("views", {"long": "rest,sample"})
            raise UsageError(f"{setting('views')} is {self.views!r}; name the views of each kind, as in {example}")
        for kind, name, made in views_of(self.views):
            given = setting("views", {kind: self.views[kind]})
            check_choice(f"{given}: view", name, VIEWS)
            check_choice(f"{given}: kind of caption", kind, self.captions or USUAL_KINDS)
            if made in self.captions:
                raise UsageError(
                    f"{given} makes {made}, which {setting('captions')} names too; call that one otherwise"
                )
