"""Documents out of files: JSONL, plain text and Parquet, plain or compressed, at any fsspec URL.

Every error names the file and the line, and the way out.
"""

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

import fsspec
import pyarrow
import pyarrow.parquet
import zstandard

from model.data.config import SourceConfig

_JSONL = (".jsonl", ".ndjson", ".json")
_TEXT = (".txt", ".text", ".md", ".rst", ".py", ".c", ".h", ".tex", ".html", ".xml", ".csv", ".log")
_PACKED = (".gz", ".zst")


def find_files(name: str, source: SourceConfig) -> list[tuple[Any, str, str]]:
    """The files of a source, sorted: (filesystem, path, fingerprint of size and time).

    `path` may be a file, a folder (searched in depth; hidden files are passed over) or a glob.
    """
    filesystem, path = fsspec.core.url_to_fs(source.path)
    field = f"data.sources.{name}.path={source.path}"
    if any(sign in path for sign in "*?["):
        found = [p for p in filesystem.glob(path) if not filesystem.isdir(p)]
        if not found:
            raise ValueError(f"{field} matches no file")
    elif filesystem.isdir(path):
        found = [p for p in filesystem.find(path) if not p.rsplit("/", 1)[-1].startswith(".")]
        if not found:
            raise ValueError(f"{field} is an empty folder")
    elif filesystem.exists(path):
        found = [path]
    else:
        raise ValueError(f"{field} does not exist")
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
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: broken compression ({error}): write the file again") from error


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
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return raw


def _jsonl(source: SourceConfig, lines: IO[bytes], path: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number}: broken JSON ({error.msg} at column {error.colno}): mend or remove it"
            ) from None
        if not isinstance(value, dict) or source.text_field not in value:
            has = ", ".join(sorted(value)) if isinstance(value, dict) else f"a {type(value).__name__}"
            raise ValueError(f"{path}:{number}: no field {source.text_field!r} (it has {has}): set text_field")
        text = value[source.text_field]
        if not isinstance(text, str):
            raise ValueError(f"{path}:{number}: field {source.text_field!r} is {type(text).__name__}, not text")
        yield text


def _text(file: IO[bytes], path: str) -> str:
    data = file.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason} at byte {error.start})") from None


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
