import json
import os
import subprocess
from pathlib import Path

import pytest

from dstrain.base.code_digest import code_digest
from dstrain.base.durations import parse_slurm_limit
from dstrain.errors import UserError
from dstrain.rundir.attempt_files import write_json
from dstrain.supervise.batch import attempts_without_progress, is_done, run
from dstrain.transport.profile import Profile, load_profile, profile_model
from dstrain.transport.stops import Stops
from dstrain.transport.submission import Submission
from dstrain.transports.slurm import TRANSPORT, Slurm, sbatch_script, warning_seconds

ROOT = Path(__file__).parents[2]
SlurmProfile = profile_model(TRANSPORT)
HOSTILE = Path("/runs/a'; touch x/$HOME/`id`/zwei\nZeilen ü")


def submission(
    profile: Profile, run_dir: Path = Path("/shared/you/project/runs/bert-base"), **changes: object
) -> Submission:
    values = {
        "name": "bert-base",
        "run_dir": run_dir,
        "folder": run_dir.parents[1],
        "profile": profile,
        "supervisors_python": "/shared/you/venv/bin/python",
        "ranks": 8,
        "nodes": (2, 2),
        "max_restarts": 3,
        "code": "0123456789abcdef",
        "chain": None,
    }
    return Submission(**{**values, **changes})  # type: ignore[arg-type]


def test_the_committed_script_is_what_the_renderer_gives_for_the_committed_profile() -> None:
    script = sbatch_script(submission(load_profile(ROOT / "launch/slurm.yaml")), lead_seconds=600)
    assert (ROOT / "launch/slurm.sbatch").read_text() == script


def test_every_key_and_hostile_names() -> None:
    slurm = Slurm(
        partition="gpu",
        account="abc",
        qos="long",
        time="0:30",
        gres="gpu:a100:8",
        cpus_per_task=64,
        constraint="[rack1*2&rack2*2]",
        exclude="n[7-9]",
        reservation="räume",
        mail_user="me@example.org",
        mail_type="FAIL,REQUEUE",
        requeue=False,
        extra=("--mem=0", "--exclusive"),
    )
    profile = SlurmProfile(
        transport="slurm",
        slurm=slurm,
        pass_environment=("WANDB_API_KEY",),
        modules=("cuda/12", "it's"),
        venv="/ven v",
    )
    script = sbatch_script(submission(profile, HOSTILE, nodes=(2, 4), chain=3), lead_seconds=600)
    assert (
        script
        == r"""#!/bin/bash --login
#SBATCH --job-name=bert-base-JOB
#SBATCH --nodes=2-4
#SBATCH --partition=gpu
#SBATCH --account=abc
#SBATCH --qos=long
#SBATCH --time=0:30
#SBATCH --gres=gpu:a100:8
#SBATCH --cpus-per-task=64
#SBATCH --constraint=[rack1*2&rack2*2]
#SBATCH --exclude=n[7-9]
#SBATCH --reservation=räume
#SBATCH --mail-user=me@example.org
#SBATCH --mail-type=FAIL,REQUEUE
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --no-requeue
#SBATCH --signal=B:USR1@1
#SBATCH --export=HOME,USER,LOGNAME,SHELL,WANDB_API_KEY
#SBATCH --output=/dev/null
#SBATCH --dependency=singleton

# Until the supervisor listens, the warning before the time limit must not end this script.
trap '' USR1
set -e
exec >>'/runs/a'"'"'; touch x/$HOME/`id`/zwei
Zeilen ü/slurm.log' 2>&1
cd -- '/runs/a'"'"'; touch x/$HOME'
module load cuda/12
module load 'it'"'"'s'
source '/ven v/bin/activate'

# Starts the nodes with srun, stays with them, and requeues this job once a checkpoint is committed.
exec /shared/you/venv/bin/python -u -m dstrain.supervise.batch --run-dir '/runs/a'"'"'; touch x/$HOME/`id`/zwei
Zeilen ü' --code 0123456789abcdef
""".replace("-JOB", "-" + script.splitlines()[1].rpartition("-")[2])
    )


def test_a_hostile_folder_is_only_a_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "a'; touch x; $HOME `touch y`\nü" / "runs" / "r"
    run_dir.mkdir(parents=True)
    profile = SlurmProfile(transport="slurm", slurm=Slurm())
    script = sbatch_script(submission(profile, run_dir, supervisors_python="/bin/echo"), lead_seconds=600)
    done = subprocess.run(["bash"], input=script.encode(), cwd=tmp_path, env={"PATH": os.defpath}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert str(run_dir) in (run_dir / "slurm.log").read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == [run_dir.parents[1].name]


def test_a_submission_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / "b/c").mkdir(parents=True)
    wanted = submission(load_profile(ROOT / "launch/slurm.yaml"), tmp_path / "b/c", nodes=(1, 3), chain=2)
    write_json(wanted.run_dir / "submission.json", wanted.as_json())
    assert Submission.read(wanted.run_dir) == wanted


def test_the_value_of_a_passed_variable_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "sk-123")
    given = submission(SlurmProfile(transport="slurm", slurm=Slurm(), pass_environment=("WANDB_API_KEY",)))
    assert "sk-123" not in sbatch_script(given, 600) + json.dumps(given.as_json())


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("2-0", 172800), ("1-12:30", 131400), ("0", None)],
)
def test_times_of_slurm(time: str, seconds: int | None) -> None:
    assert parse_slurm_limit(time) == seconds


def test_the_warning_comes_after_the_supervisors_own_clock() -> None:
    assert warning_seconds("24:00:00", 600) == 540
    assert warning_seconds("1:00:00", 6000) == 1140
    assert warning_seconds("1:00", 600) == 1
    assert warning_seconds(None, 600) == 1


def test_attempts_without_progress_are_counted_over_all_jobs(tmp_path: Path) -> None:
    assert attempts_without_progress(tmp_path, 1) == 0
    for number, before in enumerate([None, None, 10, 20, 20], start=1):
        write_json(tmp_path / f"attempts/{number:04d}/command.json", {"checkpoint_before": before})
    assert attempts_without_progress(tmp_path, 1) == 0  # there is no checkpoint now: they were all pruned
    write_json(tmp_path / "checkpoints/step-0000000020/manifest.json", {})
    assert attempts_without_progress(tmp_path, 1) == 2
    assert attempts_without_progress(tmp_path, 5) == 1
    assert attempts_without_progress(tmp_path, 6) == 0  # it was submitted again
    write_json(tmp_path / "checkpoints/step-0000000030/manifest.json", {})
    assert attempts_without_progress(tmp_path, 1) == 0


def test_a_later_job_of_a_chain_finds_the_run_done_unless_the_recipe_is_newer(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    assert not is_done(tmp_path)
    write_json(tmp_path / "attempts/0002/outcome.json", {"outcome": "done"})
    assert is_done(tmp_path)
    later = (tmp_path / "attempts/0002/outcome.json").stat().st_mtime + 1
    os.utime(tmp_path / "recipe.yaml", (later, later))
    assert not is_done(tmp_path)


def test_a_job_gives_up_after_too_many_attempts_without_a_newer_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, before in enumerate([None, 10, 10, 10], start=1):
        write_json(tmp_path / f"attempts/{number:04d}/command.json", {"checkpoint_before": before})
    write_json(tmp_path / "checkpoints/step-0000000010/manifest.json", {})
    (tmp_path / "recipe.yaml").touch()
    given = submission(SlurmProfile(transport="slurm", slurm=Slurm()), tmp_path, folder=tmp_path, max_restarts=2)
    assert run(given, code_digest(), "1", Stops()) == 1
    words = "bert-base: 3 attempts without a newer checkpoint, more than --max-restarts=2; attempts/ has what became"
    assert capsys.readouterr().err.startswith(words)
    assert len(list((tmp_path / "attempts").iterdir())) == 4


def test_a_job_does_not_run_other_code_than_was_submitted(tmp_path: Path) -> None:
    given = submission(SlurmProfile(transport="slurm", slurm=Slurm()), tmp_path, folder=tmp_path)
    with pytest.raises(UserError, match=r"the package has changed \(digest \w+, submitted was 00ff\); submit the run"):
        run(given, "00ff", "1", Stops())
    assert not (tmp_path / "attempts").exists()
