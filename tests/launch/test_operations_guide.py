"""What docs/operations.md shows is what there is."""

import re
import shlex
from pathlib import Path

import pytest

from dstrain.base.phases import RankPhase
from dstrain.cli import parse
from dstrain.diagnose.causes import _KNOWN, _LASTING, explain
from dstrain.diagnose.failure import Hang, RankFailure
from dstrain.preflight.lint import lint
from dstrain.transport.profile import load_profile

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/operations.md").read_text()
COMMANDS = [re.split(r" {2,}", line)[0] for line in GUIDE.splitlines() if line.startswith("dstrain ")]


def test_the_guide_shows_commands() -> None:
    assert len(COMMANDS) >= 28


@pytest.mark.parametrize("command", COMMANDS + [f"dstrain {c}" for c in re.findall(r"`dstrain (ckpt [^`]+)`", GUIDE)])
@pytest.mark.slow
def test_each_command_is_one(command: str) -> None:
    arguments = parse(shlex.split(command)[1:])
    if arguments.command == "run":
        assert (ROOT / arguments.recipe).is_file()
        assert arguments.on is None or (ROOT / arguments.on).is_file()


def test_each_cause_of_a_verdict_is_explained() -> None:
    hangs = [Hang(RankPhase.STEP, 1.0, is_stopped=True), *(Hang(phase, 1.0, is_stopped=False) for phase in RankPhase)]
    causes = sorted({explain(RankFailure(0, "a", -9, 1.0, hang=hang), 0)[0] for hang in hangs})
    causes += [cause for table in (_LASTING, _KNOWN) for _, cause, _ in table]
    causes += ["out-of-memory killer", "a mapped file lost its storage", "a crash in native code"]
    assert len(causes) == 16
    table = GUIDE[GUIDE.index("| the verdict says |") : GUIDE.index("**Hangs.**")]
    for cause in causes:
        words = re.split(r"[:,]| where | of the process | of its own", cause)[0]
        assert f"| {words}" in table or f", {words}" in table, cause


def test_each_container_passes_on_what_ranks_need(tmp_path: Path) -> None:
    shown = re.findall(r"^container: .*", GUIDE, re.MULTILINE)
    assert len(shown) == 3
    for line in shown:
        (tmp_path / "profile.yaml").write_text(f"transport: local\n{line}\n")
        (found,) = lint(load_profile(tmp_path / "profile.yaml"), {}, 600, None)
        assert found.level == "ok", found


def test_each_script_is_there_and_can_be_run() -> None:
    scripts = set(re.findall(r"launch/\w+\.sh", GUIDE))
    assert scripts == {f"launch/{file.name}" for file in (ROOT / "launch").glob("*.sh")}
    assert all((ROOT / script).stat().st_mode & 0o111 for script in scripts)
