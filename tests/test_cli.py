import importlib
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_support import VALID, write

import dstrain.cli
from dstrain.cli import main, parse


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dstrain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60)


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = """
import sys
from dstrain.cli import main
assert main(["--help"]) == 0
heavy = {"torch", "pydantic", "yaml", "numpy", "rich"} & set(sys.modules)
assert not heavy, heavy
"""
    fewest_seconds = float("inf")  # of a processor: the machine may be busy with something else
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        fewest_seconds = min(fewest_seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert fewest_seconds < 0.3


@pytest.mark.parametrize(
    "words",
    [
        "",
        "run",
        "plan",
        "recipe show",
        "recipe schema",
        "corpus docstrings",
        "tokenizer train",
        "shards build",
        "shards index",
        "shards check",
        "shards cat",
        "ckpt ls",
        "ckpt verify",
        "ckpt export",
        "ckpt prune",
        "ckpt release",
        "report",
        "ledger",
        "find",
        "rows",
        "predict",
    ],
)
def test_every_command_has_help(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words.split(), "--help"]) == 0
    assert "usage: dstrain" in capsys.readouterr().out


def test_every_command_leads_to_a_function() -> None:
    handlers = re.findall(r'"(dstrain\.[a-z._]+):(\w+)"', Path(dstrain.cli.__file__).read_text(encoding="utf-8"))
    assert len(handlers) >= 18
    for module, function in handlers:
        assert callable(getattr(importlib.import_module(module), function))


def test_a_users_mistake_is_printed_without_a_traceback(tmp_path: Path) -> None:
    path = write(tmp_path, VALID.replace("lanes: 64", "lanes: 48").replace("name: example", "name: a/b"))
    for command in (["recipe", "show", path], ["plan", path], ["run", path, "--dry-run"]):
        result = run(*command, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stdout == ""
        assert f"error: {path}:1: name=a/b must begin" in result.stderr
        assert "use 480 or 528" in result.stderr
        assert "Traceback" not in result.stderr


def test_mistakes_in_arguments_are_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nonsense"], [], ["plan"], ["plan", "x.yaml", "--wrold", "3"], ["recipe", "schema", "a=b"]):
        assert main(arguments) == 2
    assert "unrecognized arguments: --wrold 3; `dstrain plan --help`" in capsys.readouterr().err.replace("\n", " ")


def test_overrides_may_stand_anywhere() -> None:
    for arguments in (
        ["run", "r.yaml", "a.b=1", "c=2", "--dry-run"],
        ["run", "r.yaml", "a.b=1", "--dry-run", "c=2"],
        ["run", "--dry-run", "r.yaml", "a.b=1", "c=2"],
        ["run", "r.yaml", "--dry-run", "a.b=1", "c=2"],
    ):
        args = parse(arguments)
        assert (args.recipe, args.overrides, args.dry_run) == ("r.yaml", ["a.b=1", "c=2"], True)


@pytest.mark.slow
def test_missing_files_are_warnings_where_nothing_is_run(tmp_path: Path) -> None:
    path = write(tmp_path)
    for command in ("plan", "recipe show"):
        result = run(*command.split(), path, cwd=tmp_path)
        assert result.returncode == 0
        assert f"warning: tokenizer={tmp_path}/tok is not a folder" in result.stderr
        assert f"warning: data.train={tmp_path}/shards does not exist" in result.stderr
    result = run("run", path, "--dry-run", cwd=tmp_path)
    assert result.returncode == 2
    assert "data.train=shards does not exist" in result.stderr


@pytest.mark.slow
def test_a_plan_of_more_ranks_than_lanes_is_refused(tmp_path: Path) -> None:
    assert run("plan", write(tmp_path), "--world", "7", cwd=tmp_path).returncode == 0
    result = run("plan", write(tmp_path), "--world", "65", cwd=tmp_path)
    assert result.returncode == 2
    assert "65 ranks cannot train example: data.lanes=64 is the most; use 1 to 64 ranks" in result.stderr


def test_a_reader_that_leaves_early_is_no_failure_to_report(tmp_path: Path) -> None:
    command = f"{sys.executable} -m dstrain plan {write(tmp_path)} | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "example: masked_lm of bert on 1 rank\n"
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


@pytest.mark.parametrize("words", ["plan RECIPE", "recipe show RECIPE"])
@pytest.mark.slow
def test_output_onto_a_full_disk_is_one_sentence(tmp_path: Path, words: str) -> None:
    command = [write(tmp_path) if word == "RECIPE" else word for word in words.split()]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run([sys.executable, "-m", "dstrain", *command], stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 2
    errors = [line for line in result.stderr.decode().splitlines() if not line.startswith("warning: ")]
    assert errors == [
        "error: what the command writes, such as its redirected output: No space left on device; make room there, and "
        "run the command again"
    ]


def test_ctrl_c_is_130(tmp_path: Path) -> None:
    pipe = tmp_path / "recipe.yaml"
    os.mkfifo(pipe)  # the command waits for somebody to write a recipe
    # A shell starts what it runs in the background with SIGINT ignored, and the command would inherit that from us.
    heeding = ["env", "--default-signal=INT", sys.executable, "-m", "dstrain", "recipe", "show", str(pipe)]
    process = subprocess.Popen(heeding, stderr=subprocess.PIPE)
    with pipe.open("w"):  # opens once the command reads
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in error
