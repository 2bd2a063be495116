"""The embedded corpus: English prose from the docstrings of the installed packages. No network, nothing imported.

    *.py of site-packages and the standard library
      → ast (two processes) → docstrings → cleaned, too short or not prose dropped, duplicates dropped
      → labels/{train,valid}.csv    which package is it from; see corpus_labels.py
      → docstrings.jsonl            everything else, shared out evenly over packages up to --max-mb

The same set of installed packages gives the same bytes. Modules held out for labels/valid.csv are left out of
docstrings.jsonl as well, so an encoder pretrained on the one has never read the other.
"""

import ast
import csv
import gc
import hashlib
import inspect
import json
import multiprocessing
import re
import sys
import sysconfig
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dstrain.corpus.labels import LabelledSplit, labelled_split
from dstrain.errors import EXIT_DONE, CorpusError

STANDARD_LIBRARY = "python"  # the package name given to docstrings of the standard library
MINIMUM_CHARACTERS = 80
MINIMUM_WORDS = 12
MINIMUM_ASCII_SHARE = 0.95
MINIMUM_PROSE_SHARE = 0.75  # letters and spaces among all characters; signatures and tables have less

_SKIPPED_FOLDERS = {"tests", "test", "_vendor", "_vendored", "site-packages", "dist-packages", "__pycache__"}
_SOURCES_PER_TASK = 128

_UNDERLINE = re.compile(r"\s*([-=~^\"*#+.`])\1{2,}\s*")
_DIRECTIVE = re.compile(r"\s*\.\. .*")
_ROLE = re.compile(r":[a-zA-Z][a-zA-Z:+-]*:`[~!]?([^`<]*?)\s*(?:<[^`>]*>)?`")
_CODE = re.compile(r"``?([^`]*)``?_{0,2}")
_WORD = re.compile(r"[A-Za-z]{2,}")
_NOT_PROSE = re.compile(r"[!-@\[-`{-~]+")  # ASCII digits and punctuation


@dataclass(frozen=True)
class SourceFile:
    """One Python file of an installed package."""

    package: str
    module: str
    path: str


@dataclass(frozen=True)
class Docstring:
    """The cleaned docstring of a module, a class or a function; `name` is empty for the module itself."""

    package: str
    module: str
    name: str
    text: str

    @property
    def digest(self) -> bytes:
        """A digest of the text without regard to case and white space: equal for what counts as a duplicate."""
        return hashlib.blake2b(" ".join(self.text.lower().split()).encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Harvest:
    """What the installed packages gave: cleaned and distinct docstrings in the order of their digests."""

    docstrings: list[Docstring]
    source_files: int
    unparsable_files: int
    dropped: int  # too short, not prose, or duplicates


# ---------------------------------------------------------------- finding and reading


def installed_sources() -> list[SourceFile]:
    """Every Python file of the running interpreter's site-packages and standard library, sorted by module name.

    Tests and vendored copies of other packages are left out, and so is this package.
    """
    paths = sysconfig.get_paths()
    found: dict[tuple[str, str], SourceFile] = {}
    for root in sorted({Path(paths["purelib"]), Path(paths["platlib"])}):
        for source in sources_under(root):
            found.setdefault((source.package, source.module), source)
    for source in sources_under(Path(paths["stdlib"]), package=STANDARD_LIBRARY):
        found.setdefault((source.package, source.module), source)
    return [found[key] for key in sorted(found) if key[0] != "dstrain"]


def sources_under(root: Path, package: str | None = None) -> Iterator[SourceFile]:
    """The Python files below `root`; they belong to `package`, or to the top-level package of their path."""
    pending = [root]
    while pending:
        for path in sorted(pending.pop().iterdir()):
            if path.is_symlink():
                continue
            if path.is_dir():
                if path.name not in _SKIPPED_FOLDERS and path.name.isidentifier():
                    pending.append(path)
                continue
            names = path.relative_to(root).with_suffix("").parts
            if path.suffix == ".py" and all(map(str.isidentifier, names)) and not path.name.startswith("__editable__"):
                module = ".".join(names[:-1] if names[-1] == "__init__" and len(names) > 1 else names)
                yield SourceFile(package or names[0], module, str(path))


def docstrings_of(source: bytes) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module and of the classes and functions in it; the module's name is "".

    Raises SyntaxError, ValueError or RecursionError where Python cannot parse the source.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        tree = ast.parse(source)
    pending: list[tuple[str, ast.AST]] = [("", tree)]
    while pending:
        name, node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield name, docstring
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue  # what is defined inside a function has no readers
        for child in reversed(_statements(node)):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                pending.append((f"{name}.{child.name}" if name else child.name, child))
            elif isinstance(child, ast.If | ast.Try | ast.With):
                pending.append((name, child))


def _statements(node: ast.AST) -> list[ast.AST]:
    """The statements directly inside a compound statement, of all its branches."""
    inside: list[ast.AST] = []
    for branch in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, branch, ()):
            inside.extend(child.body if isinstance(child, ast.ExceptHandler) else [child])
    return inside


# ---------------------------------------------------------------- cleaning


def clean(docstring: str) -> str:
    """Prose of a docstring: indentation, doctests, fenced code, underlines and the commonest reST markup removed."""
    kept: list[str] = []
    in_doctest = in_fence = False
    for line in inspect.cleandoc(docstring).splitlines():
        stripped = line.strip()
        if stripped.startswith("```"):
            in_fence = not in_fence
            continue
        in_doctest = bool(stripped) and (in_doctest or stripped.startswith(">>>"))
        if in_fence or in_doctest or _UNDERLINE.fullmatch(line) or _DIRECTIVE.fullmatch(line):
            continue
        line = _CODE.sub(r"\1", _ROLE.sub(r"\1", line)).replace("**", "").rstrip()
        if line or (kept and kept[-1]):  # at most one empty line in a row
            kept.append(line)
    return "\n".join(kept).strip()


def is_prose(text: str) -> bool:
    """Whether a cleaned docstring is long enough and mostly English words."""
    if len(text) < MINIMUM_CHARACTERS or len(_WORD.findall(text)) < MINIMUM_WORDS:
        return False
    ascii_characters = len(text.encode("ascii", "ignore"))
    prose_characters = len(_NOT_PROSE.sub("", text))
    return ascii_characters >= MINIMUM_ASCII_SHARE * len(text) and prose_characters >= MINIMUM_PROSE_SHARE * len(text)


# ---------------------------------------------------------------- harvesting


def _read(sources: Sequence[SourceFile]) -> tuple[list[Docstring], int, int]:
    """Prose of some files, how many of them do not parse, and how many docstrings were not prose. Runs in a process."""
    prose: list[Docstring] = []
    unparsable = dropped = 0
    for source in sources:
        content = Path(source.path).read_bytes()
        if b'"""' not in content and b"'''" not in content:
            continue  # no docstring worth parsing a file for
        try:
            documented = list(docstrings_of(content))
        except (SyntaxError, ValueError, RecursionError):
            unparsable += 1
            continue
        for name, docstring in documented:
            text = clean(docstring)
            if is_prose(text):
                prose.append(Docstring(source.package, source.module, name, text))
            else:
                dropped += 1
    return prose, unparsable, dropped


def harvest(sources: Sequence[SourceFile], processes: int = 2) -> Harvest:
    """Read, clean and deduplicate the docstrings of `sources`; of duplicates the first in the order given is kept."""
    from rich.console import Console
    from rich.progress import track

    tasks = [sources[start : start + _SOURCES_PER_TASK] for start in range(0, len(sources), _SOURCES_PER_TASK)]
    distinct: dict[bytes, Docstring] = {}
    unparsable = dropped = 0
    console = Console(stderr=True)
    # Parsing makes millions of objects without a cycle among them: looking for cycles would cost a tenth of the time.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=gc.disable) as pool:
        results: Iterable[tuple[list[Docstring], int, int]] = pool.map(_read, tasks)
        if console.is_terminal:
            results = track(results, "reading docstrings", total=len(tasks), console=console, transient=True)
        for prose, unparsable_here, dropped_here in results:
            unparsable += unparsable_here
            dropped += dropped_here
            for docstring in prose:
                dropped += distinct.setdefault(docstring.digest, docstring) is not docstring
    return Harvest([distinct[digest] for digest in sorted(distinct)], len(sources), unparsable, dropped)


def share_evenly(wanted_bytes: dict[str, int], budget_bytes: int) -> int:
    """The most bytes that each package may give so that all together give at most `budget_bytes`.

    Small packages give all they have; what they leave is shared by the larger ones (max-min fairness).
    """
    left = budget_bytes
    sizes = sorted(wanted_bytes.values())
    for position, size in enumerate(sizes):
        share = left // (len(sizes) - position)
        if size > share:
            return share
        left -= size
    return max(sizes, default=0)


def within_budget(docstrings: Sequence[Docstring], budget_bytes: int) -> list[Docstring]:
    """The docstrings, in the order given, that fit the budget when it is shared evenly over the packages."""
    size_bytes = [len(docstring.text.encode()) for docstring in docstrings]
    wanted_bytes: Counter[str] = Counter()
    for docstring, size in zip(docstrings, size_bytes, strict=True):
        wanted_bytes[docstring.package] += size
    share = share_evenly(wanted_bytes, budget_bytes)
    taken_bytes: Counter[str] = Counter()
    kept = []
    for docstring, size in zip(docstrings, size_bytes, strict=True):
        if taken_bytes[docstring.package] + size <= share:
            taken_bytes[docstring.package] += size
            kept.append(docstring)
    return kept


# ---------------------------------------------------------------- the command


def write_corpus(harvested: Harvest, out: Path, max_mb: float | None) -> dict[str, object]:
    """Write docstrings.jsonl and labels/{train,valid}.csv below `out`; returns the summary that the command prints."""
    split = labelled_split([(entry.package, entry.module, entry.text) for entry in harvested.docstrings])
    corpus = [entry for entry in harvested.docstrings if (entry.package, entry.module) not in split.held_out]
    if max_mb is not None:
        corpus = within_budget(corpus, round(max_mb * 1e6))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "docstrings.jsonl").open("w", encoding="utf-8") as file:
            for entry in corpus:
                fields = {"text": entry.text, "package": entry.package, "module": entry.module, "name": entry.name}
                file.write(json.dumps(fields, ensure_ascii=False) + "\n")
        _write_labels(split, out / "labels")
    except OSError as error:
        raise CorpusError(f"--out {out}: {error.strerror or error}; choose a folder that can be written") from error
    return {
        "out": str(out),
        "packages": len({entry.package for entry in corpus}),
        "documents": len(corpus),
        "megabytes": round(sum(len(entry.text.encode()) for entry in corpus) / 1e6, 2),
        "source_files": harvested.source_files,
        "unparsable_files": harvested.unparsable_files,
        "dropped_docstrings": harvested.dropped,
        "labels": split.labels,
        "label_train_rows": len(split.train),
        "label_valid_rows": len(split.valid),
        "held_out_modules": len(split.held_out),
    }


def _write_labels(split: LabelledSplit, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, examples in (("train", split.train), ("valid", split.valid)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("text", "label"))
            writer.writerows(examples)


def docstrings_command(args: Namespace) -> int:
    """`dstrain corpus docstrings --out DIR [--max-mb N] [--json]`."""
    if args.max_mb is not None and args.max_mb <= 0:
        raise CorpusError(
            f"--max-mb {args.max_mb} is not a size; give a number above 0, or leave it out for everything"
        )
    summary = write_corpus(harvest(installed_sources()), Path(args.out), args.max_mb)
    if args.json:
        print(json.dumps(summary, indent=2))
        return EXIT_DONE
    print(
        f"{summary['documents']:,} documents, {summary['megabytes']} MB of text from {summary['packages']} packages "
        f"(Python {sys.version_info.major}.{sys.version_info.minor} and what is installed in it)\n"
        f"  read {summary['source_files']:,} files, {summary['unparsable_files']} of which do not parse; "
        f"dropped {summary['dropped_docstrings']:,} docstrings: short, not prose, or duplicates\n"
        f"  → {args.out}/docstrings.jsonl\n"
        f"labels: {', '.join(split_label for split_label in summary['labels'])}\n"  # type: ignore[attr-defined]
        f"  {summary['label_train_rows']:,} texts to train on, {summary['label_valid_rows']:,} held out with all of "
        f"their {summary['held_out_modules']} modules, which docstrings.jsonl leaves out too;\n"
        f"  the packages' own names are replaced in both, so that they do not give the label away\n"
        f"  → {args.out}/labels/train.csv, valid.csv"
    )
    return EXIT_DONE
