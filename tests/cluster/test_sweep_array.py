"""A sweep as an array of SLURM jobs: workers on two nodes share one study, and one that is stopped comes back."""

import json
import re
from pathlib import Path

from cluster_run import DSTRAIN, Project, wait_until
from slurm_lab import SlurmLab

PROFILE = """\
transport: slurm
procs_per_node: 1
slurm: {time: "10"}
environment: {OMP_NUM_THREADS: "1"}
"""
SWEEP = """
sweep:
  metric: loss
  direction: minimize
  trials: 3
  sampler: random
  pruner: none
  parameters:
    optimizer.learning_rate: {low: 1e-4, high: 1e-2, log: true}
"""


def logs(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("slurm-*.log")))


def test_workers_of_an_array_share_the_trials_and_a_stopped_one_comes_back(
    slurm_lab: SlurmLab, project: Project
) -> None:
    recipe, folder = project.folder / "tiny.yaml", project.folder / "it's a sweep"
    recipe.write_text(recipe.read_text() + SWEEP)
    (project.folder / "profile.yaml").write_text(PROFILE)
    command = [*DSTRAIN, "sweep", "tiny.yaml", "train.steps=40", "--dir", str(folder)]
    answer = slurm_lab.run(*command, "--on", "profile.yaml", "--jobs", "2", timeout_seconds=300)
    match = re.search(r"submitted as job (\d+), 2 workers", answer.stdout)
    assert match, answer.stdout + answer.stderr
    metrics = folder / "trial-0000" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5, 400, lambda: logs(folder))
    slurm_lab.run("scancel", "--batch", "--signal=USR1", match[1])
    wait_until(lambda: "to be gone on with" in logs(folder), 400, lambda: logs(folder))
    wait_until(lambda: logs(folder).count("3 of 3 trials done") >= 1, 400, lambda: logs(folder))
    wait_until(lambda: not slurm_lab.run("squeue", "--noheader").stdout.strip(), 400, lambda: logs(folder))

    summary = json.loads(slurm_lab.run(*command, "--worker", "9", "--json", timeout_seconds=300).stdout)
    assert [trial["state"] for trial in summary["trials"]] == ["complete"] * 3
    assert len({trial["parameters"]["optimizer.learning_rate"] for trial in summary["trials"]}) == 3
    attempts = [len(list((Path(trial["run"]) / "attempts").iterdir())) for trial in summary["trials"]]
    assert max(attempts) >= 2  # what was stopped went on from its checkpoint
    assert (folder / "best.yaml").is_file()
