"""What a tar behind a URL holds, kept on this machine once it has gone by: texts, and where the pictures lie.

The next stage, or the same command after a stop, reads the index instead of the tar. Indexes are keyed by the URL and
by what its server says of the file's state, and only whole tars get one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from llm2clip.artifacts import fingerprint
from llm2clip.captions.bad import BadPicture, logger
from llm2clip.captions.cells import TABLE_ERRORS, open_arrow
from llm2clip.captions.tars import Member

FOLDER_VARIABLE = "LLM2CLIP_INDEX_CACHE"
"""Environment variable with the folder of the indexes."""
STATE = ("size", "ETag", "etag", "LastModified", "last_modified", "mtime", "created", "blob_id", "xet_hash", "lfs")
"""Facts of a remote file that change when its content does; file systems give some of them."""
SCHEMA = pa.schema(
    {
        **{"name": pa.binary(), "offset": pa.int64(), "size": pa.int64(), "content": pa.binary()},
        **{"cause": pa.string(), "detail": pa.string()},
    }
)
ROWS_AT_ONCE = 1024


class TarIndex:
    """The index of one tar, if there is one.

    Args:
        url: where the tar lies.
        info: what its file system says of it.
        pictures: whether pictures are looked at; what they showed is part of the index.
    """

    def __init__(self, url: str, info: Mapping[str, Any], *, pictures: bool) -> None:
        state = {name: str(info[name]) for name in STATE if info.get(name) is not None}
        self.path = index_folder() / f"{fingerprint([url, state, pictures])}.arrow" if state else None

    def load(self) -> list[Member] | None:
        """The tar's members; None if there is no index, or it is damaged."""
        if self.path is None or not self.path.exists():
            return None
        try:
            batches = open_arrow(str(self.path)).to_batches()
            return [_member(row) for batch in batches for row in batch.to_pylist()]
        except TABLE_ERRORS:  # written anew when the tar has gone by
            return None

    def save(self, members: Sequence[Member]) -> None:
        """Keep the index; without room or right to do so the tar is just read again next time."""
        if self.path is None:
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.uname().nodename}.{os.getpid()}")  # several may write
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
                for start in range(0, len(members), ROWS_AT_ONCE):
                    rows = [_row(member) for member in members[start : start + ROWS_AT_ONCE]]
                    writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
            os.replace(temporary, self.path)
        except OSError as error:
            logger.warning("no index of remote tars is kept: %s; set %s to another folder", error, FOLDER_VARIABLE)


def index_folder() -> Path:
    """Where indexes lie: `$LLM2CLIP_INDEX_CACHE`, otherwise in the user's cache."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm2clip" / "tar-indexes"


def _row(member: Member) -> dict[str, Any]:
    return {
        "name": os.fsencode(member.name),
        "offset": member.offset,
        "size": member.size,
        "content": member.content,
        "cause": member.defect.cause if member.defect else None,
        "detail": member.defect.detail if member.defect else None,
    }


def _member(row: dict[str, Any]) -> Member:
    defect = BadPicture(row["cause"], row["detail"]) if row["cause"] else None
    return Member(os.fsdecode(row["name"]), row["offset"], row["size"], row["content"], defect)
