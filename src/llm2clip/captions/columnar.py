"""Parquet and Arrow tables, row by row: their columns, and which of them hold pictures' bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import pyarrow as pa

from llm2clip.captions.cells import TABLE_ERRORS, open_arrow, open_parquet
from llm2clip.captions.rows import Row
from llm2clip.errors import SourceError

TEXT_BATCH_ROWS = 4096
PICTURE_BATCH_ROWS = 64


class ColumnTable:
    """A Parquet or Arrow file."""

    def __init__(self, path: str, kind: str) -> None:
        self.path, self.kind = path, kind
        try:
            self.schema = open_parquet(path).schema_arrow if kind == "parquet" else open_arrow(path).schema
        except TABLE_ERRORS as error:
            raise SourceError(f"{path} is damaged or no {kind} file ({error}); fetch or write it again") from None
        self.columns: list[str] = self.schema.names
        self.images = [field.name for field in self.schema if _is_image(field.type)]
        self.embedded = {*self.images, *(field.name for field in self.schema if _is_binary(field.type))}

    def rows(self, wanted: Collection[str]) -> Iterator[Row]:
        """Every row, with the `wanted` columns."""
        columns = [name for name in self.columns if name in wanted]
        try:
            for batch in self._batches(columns):
                yield from batch.to_pylist()
        except TABLE_ERRORS as error:
            raise SourceError(f"{self.path} is damaged ({error}); fetch or write it again") from None

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        num_rows = PICTURE_BATCH_ROWS if self.embedded & set(columns) else TEXT_BATCH_ROWS
        if self.kind == "parquet":
            yield from open_parquet(self.path).iter_batches(batch_size=num_rows, columns=columns)
        else:
            yield from open_arrow(self.path).select(columns).to_batches(max_chunksize=num_rows)


def _is_image(kind: pa.DataType) -> bool:
    """Whether a column is what `datasets` makes of its Image feature: a struct of bytes and path."""
    return pa.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
