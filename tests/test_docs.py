"""What the documentation shows must be so: commands that parse, files that exist, a reference that is current."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dstrain.cli import parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPE_FILES = sorted((ROOT / "recipes").glob("*/*.yaml"))


def shown_commands() -> list[str]:
    """Every line of a page, or of a recipe's header, that is a `dstrain` command; trailing explanations cut off."""
    lines = [line for page in PAGES for line in page.read_text().splitlines()]
    lines += [re.sub(r"^# *command: *", "", line) for file in RECIPE_FILES for line in file.read_text().splitlines()]
    commands = (re.split(r" {2,}(?=\S)|\s#\s", re.sub(r"(?<=\S) {2,}(?=recipes/)", " ", line))[0] for line in lines)
    return sorted({command for command in commands if re.match(r"dstrain [a-z]+( |$)", command)})


@pytest.mark.parametrize("command", shown_commands())
@pytest.mark.slow
def test_a_shown_command_parses_and_its_files_exist(command: str) -> None:
    words = shlex.split(command)[1:]
    parse([word for word in words if word != "…"])
    for word in words:
        if word.startswith("recipes/"):
            assert (ROOT / word).is_file(), f"{word} does not exist"


def test_commands_are_found_at_all() -> None:
    assert len(shown_commands()) >= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    targets = re.findall(r"\]\((?!http)([^)#]+)", text)
    for target in targets:
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(r"`((?:tests|tools|docs|launch|recipes|dstrain)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_tree_in_the_readme_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("## What is where") :]
    shown = set(re.findall(r"^  (\S+)", tree.split("```")[1], re.MULTILINE))
    package = ROOT / "dstrain"
    there = {p.name + "/" for p in package.iterdir() if (p / "__init__.py").exists()}
    there |= {p.name for p in package.glob("*.py") if not p.name.startswith("__")} - {"errors.py"}
    assert shown >= there, f"README does not show {sorted(there - shown)}"
    assert all((package / name).exists() for name in shown), "README shows what is not there"


def test_the_reference_of_recipe_keys_is_current(tmp_path: Path) -> None:
    fresh = tmp_path / "recipes.md"
    subprocess.run([sys.executable, str(ROOT / "tools" / "recipe_reference.py"), str(fresh)], check=True)
    assert fresh.read_text() == (ROOT / "docs" / "recipes.md").read_text(), "run `make schema`"
