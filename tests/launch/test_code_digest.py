import subprocess
from pathlib import Path

from dstrain.base.code_digest import code_digest, code_version

WHO = ("-c", "user.name=a", "-c", "user.email=a@example.org")


def test_the_record_of_the_code(tmp_path: Path) -> None:
    package = tmp_path / "a b" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    outside = {"digest": code_digest(package), "commit": None, "changed_since": None}
    assert code_version(package) == outside

    def git(*words: str) -> str:
        return subprocess.run(["git", *WHO, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init")
    assert code_version(package) == outside  # a checkout around it that does not hold it, such as that of a project
    git("add", ".")
    git("commit", "--message=a")
    head = git("rev-parse", "HEAD").strip()
    assert code_version(package) == {**outside, "commit": head, "changed_since": False}
    (package / "new.py").write_text("")
    changed = code_version(package)
    assert changed == {"digest": code_digest(package), "commit": head, "changed_since": True}
    assert changed["digest"] != outside["digest"]
