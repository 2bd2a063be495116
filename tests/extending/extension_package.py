"""Packages made on the spot that add something to dstrain, as other people's do: installed by pip, not patched in.

extension = install_extension({"my_thing": source}, {"dstrain.things": {"thing": "my_thing:THING"}})
extension.dstrain("plan", "recipe.yaml")          # `dstrain plan recipe.yaml` where the package is installed
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 300
PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "1.0"

[tool.setuptools]
py-modules = [{modules}]
"""


@dataclass(frozen=True)
class Extension:
    """An installed package: `environment` is that of processes which see it."""

    environment: Mapping[str, str]

    def python(self, *arguments: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        """Run Python where the package is installed."""
        return subprocess.run(
            [sys.executable, *arguments],
            env=dict(self.environment),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )

    def dstrain(self, *arguments: str, cwd: Path | None = None, exit_code: int = 0) -> str:
        """Run `dstrain ARGUMENTS` and return what it prints, to both outputs, once it ends with this exit code."""
        result = self.python("-m", "dstrain", *arguments, cwd=cwd)
        output = result.stdout + result.stderr
        assert result.returncode == exit_code, f"dstrain {' '.join(arguments)}: exit {result.returncode}\n{output}"
        return output


InstallExtension = Callable[[Mapping[str, str], Mapping[str, Mapping[str, str]]], Extension]


def write_package(project: Path, files: Mapping[str, str], entry_points: Mapping[str, Mapping[str, str]]) -> None:
    """Write a package named after its folder: `files` are sources by module name."""
    for module, source in files.items():
        (project / f"{module}.py").write_text(source)
    text = PYPROJECT.format(name=project.name, modules=", ".join(f'"{module}"' for module in files))
    for group, points in entry_points.items():
        text += f'\n[project.entry-points."{group}"]\n'
        text += "".join(f'"{point}" = "{value}"\n' for point, value in points.items())
    (project / "pyproject.toml").write_text(text)


def install(project: Path, target: Path) -> Extension:
    """Install a package into a folder of its own."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    options = ["--no-deps", "--no-build-isolation", "--target", str(target), str(project)]
    result = subprocess.run([*pip, *options], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    paths = [str(target), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return Extension({**os.environ, "PYTHONPATH": os.pathsep.join(paths)})


def documented_file(name: str) -> str:
    """The Python file that docs/extending.md shows below a line `**`name`**`, so that what it shows is what is run."""
    text = (ROOT / "docs" / "extending.md").read_text()
    shown = re.search(rf"^\*\*`{re.escape(name)}`\*\*\n+```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert shown is not None, f"docs/extending.md shows no file {name}"
    return shown[1]
