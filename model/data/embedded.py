"""Real text that any machine with Python and this project's dependencies has, found at run time in a fixed order.

Seven corpora play the paper's seven sources, so that the whole pipeline runs with no network and no download. They differ
from machine to machine with the packages installed; the prepared tokens' manifest says what was found.
"""

import doctest
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

# Packages whose documentation is rich and which this project depends on, so that they are there on every machine.
_DOCUMENTED = [
    "torch",
    "numpy",
    "fsspec",
    "rich",
    "hydra",
    "omegaconf",
    "submitit",
    "tokenizers",
    "wandb",
    "codecarbon",
]
_MAX_FILE_BYTES = 400_000  # longer ones are tables or generated


def documents(corpus: str) -> Iterator[str]:
    """The documents of one corpus, at most its cap in all. Raises ValueError for an unknown one."""
    if corpus not in CORPORA:
        raise ValueError(f"embedded corpus {corpus!r} is none of {', '.join(CORPORA)}")
    find, max_bytes = CORPORA[corpus]
    seen: set[bytes] = set()
    total = 0
    for text in find():
        digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
        if not text.strip() or digest in seen:
            continue
        seen.add(digest)
        yield text
        total += len(text)
        if total >= max_bytes:
            return


def fingerprint() -> str:
    """Changes with Python and with the packages that the corpora are taken from."""
    versions = sorted(f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions())
    return hashlib.sha256("\n".join([sys.version, *versions]).encode()).hexdigest()[:16]


def _read(path: Path) -> str:
    """The text of a file, or nothing where it is too long or not UTF-8 (some of the standard library's tests are not)."""
    try:
        if path.stat().st_size <= _MAX_FILE_BYTES:
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        pass
    return ""


def _site() -> Path:
    return Path(sysconfig.get_paths()["purelib"])


def _spread(paths: list[Path]) -> list[Path]:
    """In an order fixed by each path's hash, so that a cap takes some of every package."""
    return sorted(paths, key=lambda p: hashlib.blake2b(p.as_posix().rsplit("site-packages/")[-1].encode()).digest())


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "__pycache__", "lib2to3", "idlelib", "pydoc_data"}
    return _spread([p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)])


def _package_files(pattern: str) -> list[Path]:
    """Where Python finds the packages: a virtual environment may take them from the system's."""
    found: list[Path] = []
    for name in _DOCUMENTED:
        spec = importlib.util.find_spec(name)
        for root in (spec and spec.submodule_search_locations) or ():
            found += Path(root).rglob(pattern)
    return _spread(found)


# A triple-quoted string that opens a line is a docstring but for rare exceptions; parsing every file takes twenty times as long.
_DOCSTRING = re.compile(r'^[ \t]*[rR]?"""(.+?)"""', re.MULTILINE | re.DOTALL)


def _docstrings(path: Path) -> list[str]:
    return [inspect.cleandoc(text) for text in _DOCSTRING.findall(_read(path)) if len(text) > 80]


def package_docstrings() -> Iterator[str]:
    """The documentation of each module of the installed packages, a module a document."""
    for path in _package_files("*.py"):
        if found := _docstrings(path):
            yield "\n\n".join(found) + "\n"


def standard_library_docstrings() -> Iterator[str]:
    for path in _standard_library():
        if found := _docstrings(path):
            yield "\n\n".join(found) + "\n"


def standard_library_code() -> Iterator[str]:
    for path in _standard_library():
        if text := _read(path):
            yield text


def python_reference() -> Iterator[str]:
    """The language reference as `help()` shows it, a topic a document."""
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield topics[name]


def licences() -> Iterator[str]:
    """Long, carefully written prose: the licences and notices of installed packages."""
    named = re.compile(r"(licen[cs]e|copying|notice|authors|copyright)", re.IGNORECASE)
    files = [p for p in _site().glob("*.dist-info/**/*") if p.is_file() and named.search(p.name)]
    files += [Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"]
    for path in sorted(files):
        if text := _read(path):
            yield text
    yield sys.copyright + "\n"


def package_readmes() -> Iterator[str]:
    """How packages introduce themselves: the long description in each one's metadata."""
    for distribution in sorted(metadata.distributions(), key=lambda d: str(d.metadata["Name"])):
        description = distribution.metadata.get_payload()  # type: ignore[attr-defined]
        if isinstance(description, str) and len(description) > 200:
            yield description


def questions_and_answers() -> Iterator[str]:
    """Examples of a session in docstrings: what was typed and what was answered."""
    parser = doctest.DocTestParser()
    for path in _spread(_package_files("*.py") + _standard_library()):
        for text in _docstrings(path):
            try:
                examples = parser.get_examples(text)
            except ValueError:
                continue
            if len(examples) >= 2:
                yield "\n".join(f"Q: {e.source.rstrip()}\nA: {e.want.rstrip() or '(nothing)'}" for e in examples) + "\n"


# corpus: (where it is found, at most so many characters)
CORPORA: dict[str, tuple[Callable[[], Iterator[str]], int]] = {
    "package_docstrings": (package_docstrings, 6_000_000),
    "standard_library_docstrings": (standard_library_docstrings, 3_000_000),
    "standard_library_code": (standard_library_code, 3_000_000),
    "python_reference": (python_reference, 1_500_000),
    "licences": (licences, 1_500_000),
    "package_readmes": (package_readmes, 1_500_000),
    "questions_and_answers": (questions_and_answers, 1_500_000),
}
