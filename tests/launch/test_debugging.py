"""Debug runs: `dstrain run --on launch/debug.yaml`, with and without a debugger in a real terminal."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.cli import parse
from dstrain.errors import UserError
from dstrain.observe.debug_text import collapsed, report_text
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml
from dstrain.supervise.run import run_command
from dstrain.transport.profile import load_profile

pytestmark = pytest.mark.slow

PROFILE = Path(__file__).parents[2] / "launch" / "debug.yaml"
DSTRAIN = (sys.executable, "-m", "dstrain")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_recipe: Callable[..., Recipe]) -> Path:
    """With tiny.yaml in it: 8 rows a step, in 4 micro-batches of one rank."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(resolved_yaml(tiny_recipe()))
    return tmp_path


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.pid, self._descriptor = pty.fork()
        if not self.pid:
            os.chdir(folder)
            os.execv(words[0], words)
        self.said = ""

    def wait_for(self, pattern: str, seconds: float = 300.0) -> None:
        """Until the program has said something that matches, since the last word to it."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.said[self._from :]):
            assert time.monotonic() < deadline, f"no {pattern!r} in\n{self.said}"
            if select.select([self._descriptor], [], [], 0.2)[0]:
                try:
                    self.said += os.read(self._descriptor, 65536).decode(errors="replace")
                except OSError:  # it has ended
                    assert re.search(pattern, self.said[self._from :]), f"ended without {pattern!r}:\n{self.said}"

    def type(self, line: str) -> None:
        self._from = len(self.said)
        os.write(self._descriptor, f"{line}\n".encode())

    def end(self) -> int:
        """Its exit code."""
        try:
            while os.read(self._descriptor, 65536):
                pass
        except OSError:
            pass
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    _from = 0


def test_a_debug_run_reports_and_the_next_one_with_a_debugger_begins_anew(folder: Path) -> None:
    command = [*DSTRAIN, "run", "tiny.yaml", "--on", str(PROFILE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = folder / "runs" / "tiny-debug"
    assert "tiny: a debug run, 5 steps: 1 rank × 2 rows × 4 accumulation = 8 rows" in done.stdout
    assert f"in {run_dir}, which is not the run's folder" in done.stdout
    assert [path.name for path in (folder / "runs").iterdir()] == ["tiny-debug"]
    assert len((run_dir / "ledger.jsonl").read_text().splitlines()) == 5
    report = json.loads((run_dir / "debug-report.json").read_text())
    assert report["inputs"]["input_ids"] == "int64 (2, 32)"
    assert report["outputs"]["model.bert.encoder.layer.1"] == "float32 (2, 32, 32)"
    measured, planned = report["memory_bytes"], report["planned_bytes"]
    for part in ("weights", "optimizer"):
        assert 0.95 < measured[part] / planned[part] < 1.05
    for part in ("activations", "gradients and buffers"):
        assert 0.3 < measured[part] / planned[part] < 1.5
    for phase in ("data", "forward", "backward", "step"):
        assert report["first_step_seconds"][phase] > 0 and report["later_seconds"][phase] > 0
    assert report["timed_later_steps"] == 3 and report["first_step_seconds"]["load"] > 0
    assert any(operator["name"].startswith("aten::") and operator["seconds"] > 0 for operator in report["operators"])
    for heading in ("Shapes of a micro-batch", "Memory of rank 0", "Where the time went", "Operators of the last step"):
        assert heading in done.stdout

    # an update so large that the next step's loss is not a number; anomaly detection names the operation
    words = (
        "run",
        "tiny.yaml",
        "train.steps=3",
        "optimizer.learning_rate=1e30",
        "schedule.warmup_steps=null",
        "--pdb",
        "0",
    )
    terminal = Terminal(folder, *DSTRAIN, *words, "--on", str(PROFILE))
    terminal.wait_for(r"\(Pdb\) ")
    assert "a debug run, to the end of the recipe" in terminal.said
    assert re.search(r"returned nan values in its \d+th output|is not finite", terminal.said)
    terminal.type("p 6 * 7, __name__")
    terminal.wait_for(r"\(42, '[\w.]+'\)")
    terminal.type("q")
    terminal.wait_for("Where the time went")
    assert terminal.end() in (1, 2)
    assert len((run_dir / "ledger.jsonl").read_text().splitlines()) < 3


def test_a_dry_run_shows_the_command_and_the_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(parse(["run", "tiny.yaml", "--on", str(PROFILE), "--dry-run", "--procs-per-node", "2"])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "# 2 ranks × 2 rows × 2 accumulation = 8 rows = 256 tokens",
        f"# each debug run begins anew in {folder}/runs/tiny-debug",
    ]
    assert [line.count("--terminal") for line in lines[2:]] == [1, 0]
    assert "CUDA_LAUNCH_BLOCKING=1" in lines[2] and lines[3].endswith(" &")
    assert not (folder / "runs").exists()


def test_a_real_run_is_never_deleted(folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "real" / "ledger.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="holds a run that is not a debug run"):
        run_command(parse(["run", "tiny.yaml", "--on", str(PROFILE), "--run-dir", "real"]))
    assert (folder / "real" / "ledger.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on", str(PROFILE), "--pdb", "1"], "--pdb 1: 1 ranks are numbered 0 to 0"),
        (["--on", str(PROFILE), "--pdb", "0"], "standard input is not a terminal"),
        (["--pdb", "0"], "--pdb needs a profile"),
        (["--on", "plain.yaml", "--pdb", "0"], "needs a profile with a `debug` section"),
    ],
)
def test_a_debugger_needs_a_rank_a_terminal_and_a_debug_profile(
    folder: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "plain.yaml").write_text("transport: local\n")
    with Path(os.devnull).open() as nothing, pytest.raises(UserError, match=message):
        monkeypatch.setattr(sys, "stdin", nothing)
        run_command(parse(["run", "tiny.yaml", *words]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("transport: slurm\nslurm: {}\ndebug: {steps: 2}\n", "p.yaml:3: debug is for transport: local"),
        ("transport: local\nmodules: [cuda]\ndebug: {}\n", "p.yaml:2: modules is given beside debug"),
        ("transport: local\ndebug: {step: 2}\n", "debug.step is unknown|debug.step"),
    ],
)
def test_profiles_with_a_debug_section(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_profile(tmp_path / "p.yaml")


def test_layers_that_are_alike_are_one_line() -> None:
    outputs = {f"bert.layer.{number}": "float32 (2, 4)" for number in range(12)}
    outputs |= {"bert.head": "float32 (9,)", "bert.layer.12": "float32 (9,)"}
    assert collapsed(outputs) == {
        "bert.layer.0-11": "float32 (2, 4)",
        "bert.head": "float32 (9,)",
        "bert.layer.12": "float32 (9,)",
    }


def test_the_report_as_people_see_it() -> None:
    report = {
        "device": "cpu",
        "batch": "1 rank × 2 rows × 4 accumulation = 8 rows = 256 tokens",
        "steps": 5,
        "inputs": {"input_ids": "int64 (2, 32)"},
        "outputs": {"bert": "float32 (2, 32, 8)"},
        "memory_bytes": {"weights": 4e6, "optimizer": 8e6, "gradients and buffers": 5e6, "activations": 2.5e6},
        "planned_bytes": {
            "weights": 4e6,
            "optimizer": 8e6,
            "gradients and buffers": 6e6,
            "activations": 2e6,
            "total": 2e7,
        },
        "peak_bytes": 5e8,
        "peak_is_of": "the whole process",
        "first_step_seconds": {"load": 0.5, "data": 0.25, "forward": 1.0, "backward": 2.0, "step": 0.5},
        "later_seconds": {"load": 0.0, "data": 0.3, "forward": 1.2, "backward": 2.4, "step": 0.6, "save": 0.125},
        "timed_later_steps": 3,
        "operators": [{"name": "aten::mm", "calls": 1200, "seconds": 0.75, "share": 0.5}],
    }
    assert report_text(report).splitlines() == [
        "",
        "Shapes of a micro-batch (1 rank × 2 rows × 4 accumulation = 8 rows = 256 tokens)",
        "  in   input_ids  int64 (2, 32)",
        "  out  bert       float32 (2, 32, 8)",
        "",
        "Memory of rank 0 in MB",
        "                            planned    measured",
        "  weights                       4.0         4.0",
        "  optimizer                     8.0         8.0",
        "  gradients and buffers         6.0         5.0",
        "  activations                   2.0         2.5",
        "  peak                         20.0       500.0  (measured: of the whole process)",
        "",
        "Where the time went (5 steps on cpu), seconds",
        "                          first step  each later   share",
        "  wait for data                0.250       0.100    6.7%",
        "  forward                      1.000       0.400   26.7%",
        "  backward                     2.000       0.800   53.3%",
        "  optimizer step               0.500       0.200   13.3%",
        "  load                         0.500",
        "  save                         0.125",
        "",
        "Operators of the last step, by their own time",
        "  aten::mm    1,200 calls     0.750 s   50.0%",
    ]
