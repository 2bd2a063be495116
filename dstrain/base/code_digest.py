"""Which code this is: a digest of the package's source, the same on two nodes if and only if they run the same code."""

import hashlib
from pathlib import Path
from typing import Any

from dstrain.base.processes import run

PACKAGE = Path(__file__).parent.parent


def code_digest(package: Path = PACKAGE) -> str:
    """16 hexadecimal digits of the names and contents of all Python files, in order of their names."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(package.rglob("*.py"), key=lambda file: file.relative_to(package).as_posix()):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(package).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def code_version(package: Path = PACKAGE) -> dict[str, Any]:
    """For the record: the digest; and in a git checkout the commit, and whether the package was changed since."""
    commit = _git(package, "rev-parse", "HEAD")
    changed = None if commit is None else bool(_git(package, "status", "--porcelain", "--", "."))
    return {"digest": code_digest(package), "commit": commit, "changed_since": changed}


def _git(folder: Path, *words: str) -> str | None:
    """What git says; None without git, or outside of a checkout that has `folder` in it."""
    known = ["git", "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py"]
    for command in (known, ["git", "-C", str(folder), *words]):
        try:
            answer = run(command)
        except OSError:
            return None
        if answer.exit_code != 0:
            return None
    return answer.output.strip()
