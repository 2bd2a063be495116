import json
import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from synthetic import synthetic_checkpoint

from dstrain.checkpoint.manifest import FORMAT, MANIFEST, Manifest, _written, committed, step_of
from dstrain.checkpoint.records import RECORDS, Records, record_export
from dstrain.cli import main
from dstrain.recipe.schema import Recipe
from dstrain.recipe.show import resolved_yaml


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        synthetic_checkpoint(tmp_path, step)
    return tmp_path


def damage(run_dir: Path, step: int, name: str = "rank-00001.safetensors") -> Path:
    path = run_dir / "checkpoints" / f"step-{step:010d}" / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    return path


def test_ls_lists_newest_first(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run_dir, 20, MANIFEST)
    assert main(["ckpt", "ls", str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = ["step", "size", "age", "ranks", "ZeRO", "precision", "batches", "verified", "folder"]
    assert lines[0].split() == headings
    *entry, folder = re.sub(r" \d+ s ", " AGE ", lines[1]).split()
    assert entry == ["30", "0.0", "MB", "AGE", "2", "1", "bf16", "30", "-"]
    assert folder == f"{run_dir}/checkpoints/step-0000000030"
    assert "damaged" in lines[2]
    assert len(lines) == 4


def test_ls_json(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run_dir, 20, MANIFEST)
    assert main(["ckpt", "ls", "--json", str(run_dir)]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["step"] for entry in listed] == [30, 20, 10]
    assert 0 <= listed[0]["age_seconds"] < 600
    assert listed[0] | {"bytes": 0, "age_seconds": 0} == {
        "step": 30,
        "folder": str(run_dir / "checkpoints" / "step-0000000030"),
        "bytes": 0,
        "data_step": 30,
        "learning_rate": 1e-3,
        "world_size": 2,
        "zero_stage": 1,
        "precision": "bf16",
        "age_seconds": 0,
        "verified_at": None,
        "exports": [],
    }
    assert listed[1].keys() == {"step", "folder", "problem"}


def test_verify_a_run_and_a_checkpoint(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ckpt", "verify", str(run_dir)]) == 0
    assert capsys.readouterr().out.count(": good\n") == 3
    damaged = damage(run_dir, 20)
    assert main(["ckpt", "verify", str(run_dir)]) == 2
    printed = capsys.readouterr()
    assert printed.out.count(": good\n") == 2
    assert printed.err == f"error: {damaged}: its content changed since it was written (sha256 differs)\n"
    assert main(["ckpt", "verify", str(damaged.parent)]) == 2
    assert main(["ckpt", "verify", str(damaged.parents[1] / "step-0000000010")]) == 0


def test_ls_says_what_was_verified_and_exported(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def listed() -> dict[int, tuple[bool, list[str]]]:
        capsys.readouterr()
        assert main(["ckpt", "ls", "--json", str(run_dir)]) == 0
        entries = json.loads(capsys.readouterr().out)
        return {entry["step"]: (entry["verified_at"] is not None, entry["exports"]) for entry in entries}

    checkpoint = run_dir / "checkpoints" / "step-0000000030"
    before = time.time()
    assert main(["ckpt", "verify", str(checkpoint)]) == 0
    record_export(checkpoint, run_dir / "export")
    assert listed() == {30: (True, [str(run_dir / "export")]), 20: (False, []), 10: (False, [])}
    verified_at = Records.read(run_dir).of(checkpoint).verified_at
    assert verified_at is not None and before <= verified_at <= time.time()
    shutil.rmtree(checkpoint)  # and the step is saved again, with another content
    synthetic_checkpoint(run_dir, 30, world_size=1)
    assert listed()[30] == (False, [])
    (run_dir / "checkpoints" / RECORDS).write_text("[")
    assert listed()[10] == (False, [])


def test_diff_is_by_parameter_and_knows_no_topology(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two, three = (synthetic_checkpoint(tmp_path / str(world), 10, world_size=world) for world in (2, 3))
    assert main(["ckpt", "diff", str(two), str(three)]) == 0
    assert "3 of 3 parameters are bit-equal, with all their states" in capsys.readouterr().out
    later = synthetic_checkpoint(tmp_path / "2", 11)
    assert main(["ckpt", "diff", "--json", str(later), str(tmp_path / "3")]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["counters"]["step"] == [11, 10]
    assert found["parameters"]["norm"]["exp_avg"] == {
        "bit_equal": False,
        "largest": 1.0,
        "relative": pytest.approx(math.sqrt(5 / sum((k + 10) ** 2 for k in range(5)))),
    }
    assert main(["ckpt", "diff", str(later), str(three)]) == 1
    printed = capsys.readouterr().out
    assert "step: 11 and 10" in printed
    assert re.search(r"^scale +1\.0e-01 +1\.0e-01 +1\.0e-01$", printed, re.MULTILINE)


def test_diff_refuses_damage_and_another_model(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = damage(run_dir, 30)
    assert main(["ckpt", "diff", str(run_dir), str(damaged.parents[1] / "step-0000000010")]) == 2
    assert str(damaged) in capsys.readouterr().err
    monkeypatch.setattr("synthetic.SHAPES", {"embed": [7, 4]})
    other = synthetic_checkpoint(tmp_path / "other", 10)
    assert main(["ckpt", "diff", str(damaged.parents[1] / "step-0000000010"), str(other)]) == 2
    assert "is of another model: embed has shape [7, 3] there and shape [7, 4] here" in capsys.readouterr().err


def test_verify_json_has_every_problem(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = damage(run_dir, 20)
    assert main(["ckpt", "verify", "--json", str(run_dir)]) == 2
    found = {Path(entry["folder"]).name: entry["problems"] for entry in json.loads(capsys.readouterr().out)}
    assert [len(problems) for problems in found.values()] == [0, 1, 0]
    assert str(damaged) in found["step-0000000020"][0]


def test_prune_keeps_the_newest_sound_ones(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run_dir, 30)
    assert main(["ckpt", "prune", str(run_dir), "--keep", "1"]) == 0
    assert [step_of(folder) for folder in committed(run_dir)] == [30, 20]
    printed = capsys.readouterr().out
    assert "skipped step-0000000030: " in printed
    assert f"removed {run_dir / 'checkpoints' / 'step-0000000010'}\n1 removed, 2 left" in printed


def test_prune_removes_nothing_when_nothing_is_sound(run_dir: Path) -> None:
    for step in (10, 20, 30):
        damage(run_dir, step)
    assert main(["ckpt", "prune", str(run_dir), "--keep", "1"]) == 2
    assert len(committed(run_dir)) == 3
    assert main(["ckpt", "prune", str(run_dir), "--keep", "0"]) == 2


@pytest.mark.parametrize("command", [["ls"], ["verify"], ["prune", "--keep", "1"], ["export"]])
def test_a_folder_without_checkpoints_is_the_users_mistake(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ckpt", *command, str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} has no checkpoints; give the folder of a run that has saved one\n"
    )
    assert main(["ckpt", *command, str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_export_of_a_step_that_is_not_there(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ckpt", "export", str(run_dir), "--step", "15"]) == 2
    assert "has checkpoints of the steps 30, 20, 10; give one of them" in capsys.readouterr().err
    checkpoint = run_dir / "checkpoints" / "step-0000000010"
    assert main(["ckpt", "export", str(checkpoint), "--step", "15"]) == 2
    assert "is a checkpoint of another step" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["ckpt", "verify", "RUN"],
        ["ckpt", "prune", "RUN", "--keep", "1"],
        ["ckpt", "export", "RUN"],
        ["ckpt", "diff", "RUN", "RUN"],
        ["ledger", "RUN"],
        ["replay", "RUN", "--step", "31"],
    ],
    ids=lambda command: command[0] if command[0] != "ckpt" else command[1],
)
def test_a_checkpoint_of_a_newer_format_is_named_and_not_passed_over(
    run_dir: Path, tiny_recipe: Callable[..., Recipe], command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = run_dir / "checkpoints" / "step-0000000030" / MANIFEST
    manifest.write_text(_written(asdict(Manifest.read(manifest.parent)) | {"format": FORMAT + 1, "novelty": "unknown"}))
    (run_dir / "recipe.yaml").write_text(resolved_yaml(tiny_recipe()))
    for step in range(1, 32):
        line = {"step": step, "rows": [8 * (step - 1), 8 * step - 1], "digest": "0" * 32}
        with (run_dir / "ledger.jsonl").open("a") as ledger:
            ledger.write(json.dumps(line) + "\n")
    assert main([word.replace("RUN", str(run_dir)) for word in command]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if str(manifest) in line]
    assert error.startswith(
        f"error: {manifest} is of checkpoint format {FORMAT + 1}, this dstrain reads format {FORMAT}; "
    )
    assert len(committed(run_dir)) == 3
