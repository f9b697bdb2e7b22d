"""Documents out of files: JSONL, plain text and Parquet, plain or compressed, at any fsspec URL.

Every error names the file and the line, and the way out.
"""

import codecs
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

import fsspec
import pyarrow
import pyarrow.parquet

from model.data.config import SourceConfig

_JSONL = (".jsonl", ".ndjson", ".json")
_TEXT = (".txt", ".text", ".md", ".rst", ".py", ".c", ".h", ".tex", ".html", ".xml", ".csv", ".log")
_PACKED = (".gz", ".zst")
MEND_PATH = "mend the path (a file, a folder or a glob)"


def find_files(name: str, source: SourceConfig) -> list[tuple[Any, str, str]]:
    """The files of a source, sorted: (filesystem, path, fingerprint of size and time).

    `path` may be a file, a folder (searched in depth; hidden files are passed over) or a glob. What is there under that very
    name is no glob.
    """
    filesystem, path = fsspec.core.url_to_fs(source.path)
    field = f"data.sources.{name}.path={source.path}"
    if any(sign in path for sign in "*?[") and not filesystem.exists(path):
        found = [p for p in filesystem.glob(path) if not filesystem.isdir(p)]
        if not found:
            raise ValueError(f"{field} matches no file: mend the path (*, ? and [ ] stand for other characters)")
    elif filesystem.isdir(path):
        found = [p for p in filesystem.find(path) if not p.rsplit("/", 1)[-1].startswith(".")]
        if not found:
            raise ValueError(f"{field} is an empty folder: put files there, or mend the path")
    elif filesystem.exists(path):
        found = [path]
    else:
        raise ValueError(f"{field} does not exist: {MEND_PATH}")
    files = []
    for p in sorted(found):
        info = filesystem.info(p)
        when = next((str(info[k]) for k in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(k)), "")
        files.append((filesystem, p, f"{info.get('size')}/{when}"))
    return files


def read_file(name: str, source: SourceConfig, filesystem: Any, path: str) -> Iterator[str]:
    """The documents of one file, one at a time."""
    kind = _kind(name, source, path)
    try:
        with filesystem.open(path, "rb") as raw:
            if kind == "parquet":
                yield from _parquet(source, raw, path)
            elif kind == "jsonl":
                yield from _jsonl(source, _unpacked(raw, path), path)
            else:
                yield _text(_unpacked(raw, path), path)
    except (OSError, zlib.error, EOFError, pyarrow.ArrowInvalid) as error:
        # Arrow's own are plain and have no number; any other OSError is the store's, not the file's.
        if isinstance(error, OSError) and (error.errno or type(error) not in (OSError, gzip.BadGzipFile)):
            raise
        what = "damaged Parquet" if kind == "parquet" else "broken compression"
        raise ValueError(f"{path}: {what} ({' '.join(str(error).split())}): write the file again") from error


def _kind(name: str, source: SourceConfig, path: str) -> str:
    if source.format != "auto":
        return source.format
    plain = path
    for ending in _PACKED:
        plain = plain.removesuffix(ending)
    if plain.endswith(_JSONL):
        return "jsonl"
    if plain.endswith(".parquet"):
        return "parquet"
    if plain.endswith(_TEXT):
        return "text"
    raise ValueError(
        f"{path}: its ending does not tell the format: set data.sources.{name}.format to jsonl, text or parquet"
    )


def _unpacked(raw: IO[bytes], path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if path.endswith(".zst"):
        # Arrow's reader raises where the file ends within a frame; zstandard's takes that for the end of the text.
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    return raw


def _jsonl(source: SourceConfig, lines: IO[bytes], path: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        value = _json(_decoded(line, path, number).removeprefix("\ufeff"), f"{path}:{number}")
        if not isinstance(value, dict) or source.text_field not in value:
            has = ", ".join(sorted(value)) if isinstance(value, dict) else f"a {type(value).__name__}"
            raise ValueError(f"{path}:{number}: no field {source.text_field!r} (it has {has}): set text_field")
        text = value[source.text_field]
        if not isinstance(text, str):
            raise ValueError(f"{path}:{number}: field {source.text_field!r} is {type(text).__name__}, not text")
        yield text


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        why = f"{error.msg} at column {error.colno}"
    except ValueError:
        why = f"a number of more than {sys.get_int_max_str_digits():,} digits"
    except RecursionError:
        why = "nested too deeply"
    raise ValueError(f"{where}: broken JSON ({why}): mend or remove it")


def _text(file: IO[bytes], path: str) -> str:
    return _decoded(file.read(), path, 1)


def _decoded(data: bytes, path: str, first_line: int) -> str:
    # Without a mark at its beginning, UTF-16 of Latin letters has a zero in each pair of bytes, which UTF-8 would let pass.
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or data[:2].count(0) == 1:
        raise ValueError(
            f"{path}:{first_line}: looks like UTF-16 and must be UTF-8: iconv -f UTF-16 -t UTF-8 writes it so"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise ValueError(
            f"{path}:{line}: not UTF-8 ({error.reason} at byte {error.start}): write the file as UTF-8, or remove the line"
        ) from None


def _parquet(source: SourceConfig, file: IO[bytes], path: str) -> Iterator[str]:
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error})") from None
    if source.text_field not in table.schema_arrow.names:
        raise ValueError(
            f"{path}: no column {source.text_field!r} (it has {', '.join(table.schema_arrow.names)}): set text_field"
        )
    row = 0
    for batch in table.iter_batches(batch_size=1024, columns=[source.text_field]):
        for text in batch.column(0).to_pylist():
            row += 1
            if not isinstance(text, str):
                raise ValueError(
                    f"{path}: row {row}: column {source.text_field!r} holds {type(text).__name__}, not text"
                )
            yield text
