"""`dstrain run --on` a SLURM profile, on real daemons: whatever interrupts the job, the rows of a single process."""

import json
import re
import sys
from pathlib import Path

from cluster_run import DSTRAIN, HANG_SECONDS, SECRET, STEPS, Project, wait_until
from slurm_lab import SlurmLab

from dstrain.observe.run_record import RunRecord

PROFILE = """\
transport: slurm
nodes: {nodes}
procs_per_node: 1
slurm: {{time: "{time}", requeue: {requeue}}}
environment: {{OMP_NUM_THREADS: "1"}}
pass_environment: [SOME_API_KEY]
"""
# A supervisor without ranks, which stops as one with ranks does.
SUPERVISOR = """\
#!/bin/bash
#SBATCH --job-name=stand-in
#SBATCH --nodes=1
#SBATCH --dependency=singleton
#SBATCH --output=/dev/null
exec {python} -c '
import os, signal, sys, time
from dataclasses import replace
from pathlib import Path
from dstrain.observe.run_record import RunRecord, close_record
from dstrain.rundir.attempt_files import write_json
run_dir = Path(sys.argv[1])
def stop(*signal_and_frame):
    write_json(run_dir / "checkpoints/step-0000000007/manifest.json", {{}})
    write_json(run_dir / "attempts/0001/outcome.json", {{"outcome": "stopped", "step": 7}})
    close_record(run_dir, 75)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
here = {{"host": os.uname().nodename, "pid": os.getpid(), "job": os.environ["SLURM_JOB_ID"]}}
replace(RunRecord.read(run_dir), **here).write(run_dir)
time.sleep(300)
' {run_dir}
"""
START_SECONDS = 300.0  # of a job on a busy machine, up to its first steps
END_SECONDS = 600.0


def submit(lab: SlurmLab, project: Project, profile: str, *words: str) -> list[str]:
    """`dstrain run`: the numbers of its jobs."""
    return re.findall(r"as job (\d+),", lab.run(*project.command(profile, *words), timeout_seconds=300).stdout)


def state(lab: SlurmLab, job: str) -> dict[str, str]:
    fields = lab.run("scontrol", "show", "job", "--oneliner", job).stdout.split()
    return dict(field.split("=", 1) for field in fields if "=" in field)


def log(project: Project) -> str:
    file = project.run_dir / "slurm.log"
    return file.read_text() if file.exists() else "(no slurm.log)"


def wait_for_step(project: Project, attempt: int, step: int) -> int:
    """Until that attempt has come so far, and is past its first step; the step that it is at."""
    wait_until(lambda: project.attempts() == attempt, START_SECONDS, lambda: log(project))
    step = max(step, (project.began_at(attempt) or 0) + 2)
    wait_until(lambda: project.step() >= step, START_SECONDS, lambda: log(project))
    return project.step()


def wait_for_state(lab: SlurmLab, project: Project, job: str, wanted: str, seconds: float) -> None:
    ends = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    wait_until(
        lambda: state(lab, job)["JobState"] in ends, seconds, lambda: f"{state(lab, job)['JobState']}\n{log(project)}"
    )
    assert state(lab, job)["JobState"] == wanted, log(project)


def check_environment(lab: SlurmLab, project: Project) -> None:
    """What runs on the job's first node has of the submitting shell what the profile names, on no command line."""
    rank = project.of_attempt(1, "ranks/rank-00000.json")["pid"]
    (supervisor,) = lab.on("node1", ["pgrep", "-f", "dstrain.supervise.batch --run-dir"]).stdout.split()
    for pid in (rank, supervisor):
        variables = lab.on("node1", ["cat", f"/proc/{pid}/environ"]).stdout.split("\0")
        assert f"SOME_API_KEY={SECRET}" in variables
        assert not [variable for variable in variables if variable.startswith("NOBODY_NAMED_THIS")]
    assert SECRET not in lab.on("node1", ["ps", "-eww", "-o", "args"]).stdout


def test_two_nodes_to_the_end(slurm_lab: SlurmLab, project: Project) -> None:
    (job,) = submit(slurm_lab, project, PROFILE.format(nodes=2, time="10", requeue="true"))
    wait_for_state(slurm_lab, project, job, "COMPLETED", END_SECONDS)
    assert project.attempts() == 1 and project.hosts_of(1) == {"node1", "node2"}
    project.check()


def test_one_job_is_signalled_requeued_preempted_and_loses_a_node(slurm_lab: SlurmLab, project: Project) -> None:
    (job,) = submit(slurm_lab, project, PROFILE.format(nodes=2, time="10", requeue="true"))
    steps = [wait_for_step(project, 1, 8)]
    check_environment(slurm_lab, project)
    slurm_lab.run("scancel", "--batch", "--signal=USR1", job)
    steps.append(wait_for_step(project, 2, steps[0] + 8))
    slurm_lab.run("scontrol", "requeue", job)
    steps.append(wait_for_step(project, 3, steps[1] + 8))
    answer = slurm_lab.run("sbatch", "--parsable", "--partition=high", "--nodes=3", "--exclusive", "--wrap=sleep 1")
    steps.append(wait_for_step(project, 4, steps[2] + 8))
    slurm_lab.kill_node("node2")
    wait_for_state(slurm_lab, project, job, "COMPLETED", END_SECONDS)

    assert state(slurm_lab, answer.stdout.strip())["JobState"] == "COMPLETED"
    assert state(slurm_lab, job)["Restarts"] == "4"
    assert project.attempts() == 5
    for number, step in enumerate(steps[:3], start=2):  # there was time to save: no step was made again
        began = project.began_at(number)
        assert began is not None and began >= step
    assert [project.hosts_of(number) for number in range(1, 6)] == [{"node1", "node2"}] * 4 + [{"node1", "node3"}]
    first = project.of_attempt(4, "verdict.json")["first"]
    assert (first["rank"], first["host"]) == (None, "node2")
    assert log(project).count("SIGUSR1: finishing the step and saving a checkpoint") == 2
    assert log(project).count("back into the queue") == 2  # the other two times SLURM itself has put it there
    project.check()


def test_stop_ends_the_job_that_runs_and_cancels_those_that_wait(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    def record() -> RunRecord:
        found = RunRecord.read(tmp_path)
        assert found is not None
        return found

    def submitted(count: int) -> list[str]:
        words = ("sbatch", "--parsable", str(tmp_path / "job.sh"))
        jobs = tuple(slurm_lab.run(*words).stdout.strip() for _ in range(count))
        RunRecord("stand-in", "slurm", None, None, (), 1, 20, 0.0, jobs=jobs).write(tmp_path)
        return list(jobs)

    def dstrain(command: str) -> str:
        return slurm_lab.run(*DSTRAIN, command, str(tmp_path)).stdout

    (tmp_path / "attempts/0001").mkdir(parents=True)
    (tmp_path / "job.sh").write_text(SUPERVISOR.format(python=sys.executable, run_dir=tmp_path))
    first, second = submitted(2)
    wait_until(lambda: record().pid is not None, START_SECONDS)
    assert f"slurm job {first}, supervisor {record().pid} on node1" in dstrain("status")
    assert dstrain("stop") == "stopped, and saved at step 7; the same `dstrain run` goes on from there\n"
    assert re.search(r"^state +stopped \d:\d\d:\d\d ago", dstrain("status"), re.MULTILINE)
    assert [state(slurm_lab, job)["JobState"] for job in (first, second)] == ["FAILED", "CANCELLED"]  # not requeued

    slurm_lab.run("sbatch", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 900")
    (third,) = submitted(1)
    assert f"state      waits in SLURM's queue, job {third}" in dstrain("status")
    assert dstrain("stop") == f"cancelled job {third}, which had not begun; newest checkpoint at step 7\n"
    assert state(slurm_lab, third)["JobState"] == "CANCELLED"
    assert dstrain("stop") == f"{tmp_path} is not running; newest checkpoint at step 7\n"


def test_a_job_that_its_time_limit_ends_comes_back_until_it_is_done(slurm_lab: SlurmLab, project: Project) -> None:
    (job,) = submit(slurm_lab, project, PROFILE.format(nodes=2, time="2", requeue="true"))
    wait_until(lambda: project.step() >= 8, START_SECONDS, lambda: log(project))
    attempt = project.attempts()  # the first, but on a very busy machine
    # one slow step, up to the moment when the run is asked to stop: however fast the machine, it is not done before
    rank = str(project.of_attempt(attempt, "ranks/rank-00000.json")["pid"])
    slurm_lab.on("node1", ["kill", "-STOP", rank], check=False)  # it may just have been asked, and have ended
    wait_until(lambda: log(project).count(": finishing the step and saving") >= attempt, 200, lambda: log(project))
    slurm_lab.on("node1", ["kill", "-CONT", rank], check=False)
    wait_for_state(slurm_lab, project, job, "COMPLETED", END_SECONDS)
    restarts = int(state(slurm_lab, job)["Restarts"])
    assert restarts >= 1
    assert project.attempts() == restarts + 1
    # the supervisor's own clock asks, or SLURM's warning, which may be early; whichever comes first
    asked = re.findall(r"(the time limit comes in \d+ s|SIGUSR1): finishing the step and saving", log(project))
    assert len(asked) in (restarts, restarts + 1)  # an attempt is asked once; the last one perhaps when all but done
    assert project.of_attempt(restarts + 1, "outcome.json")["outcome"] == "done"
    for number in range(2, restarts + 2):
        assert project.of_attempt(number - 1, "outcome.json") == {
            "outcome": "stopped",
            "step": project.began_at(number),
        }
    project.check()


def test_a_chain_and_then_other_nodes_and_stages(slurm_lab: SlurmLab, project: Project) -> None:
    """2 nodes under ZeRO-1, in two jobs of a chain; 1 under ZeRO-3; of 2 to 4 as many as there are, under ZeRO-2.

    There the data process of a rank hangs.
    """
    profile = PROFILE.format(nodes=2, time="10", requeue="false")
    first, second = submit(slurm_lab, project, profile, "--chain", "2")
    step = wait_for_step(project, 1, 8)
    slurm_lab.run("scancel", "--batch", "--signal=USR1", first)
    step = wait_for_step(project, 2, step + 8)
    slurm_lab.run("scancel", "--batch", "--signal=USR1", second)
    for job in (first, second):  # 75: it is not done, and comes back only as the next one of the chain
        wait_for_state(slurm_lab, project, job, "FAILED", END_SECONDS)

    requeueing = PROFILE.format(nodes=2, time="10", requeue="true")
    (third,) = submit(slurm_lab, project, requeueing, "train.zero.stage=3", "--nodes", "1")
    step = wait_for_step(project, 3, step + 8)
    said = slurm_lab.run(*DSTRAIN, "stop", str(project.run_dir), timeout_seconds=300).stdout
    assert re.fullmatch(r"stopped, and saved at step \d+; the same `dstrain run` goes on from there\n", said)
    wait_for_state(slurm_lab, project, third, "FAILED", END_SECONDS)  # stopped by a person: not requeued
    assert state(slurm_lab, third)["Restarts"] == "0"

    # SLURM grants as many of the 2 to 4 nodes as are free at that moment, and the last job's may not be yet
    nodes = ("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T")
    wait_until(lambda: slurm_lab.run(*nodes).stdout.split() == ["idle"] * 3, START_SECONDS)
    words = ("train.zero.stage=2", f"hang_timeout_seconds={HANG_SECONDS}", "--nodes", "2-4", "--chain", "2")
    fourth, fifth = submit(slurm_lab, project, profile, *words)
    wait_for_step(project, 4, step + 8)
    rank = str(project.of_attempt(4, "ranks/rank-00002.json")["pid"])
    (reader,) = slurm_lab.on("node3", ["pgrep", "-P", rank, "-f", "dstrain.data.worker"]).stdout.split()
    slurm_lab.on("node3", ["kill", "-STOP", reader])  # within the job, the run restarts on its nodes
    wait_for_state(slurm_lab, project, fourth, "COMPLETED", END_SECONDS)
    wait_for_state(slurm_lab, project, fifth, "COMPLETED", END_SECONDS)
    assert "done already" in log(project)
    assert [len(project.hosts_of(number)) for number in range(1, 6)] == [2, 2, 1, 3, 3]
    assert "nodes 2-4, and 3 there: 3 used" in log(project)
    assert "3 ranks on node1, node2, node3" in log(project)
    cause = "its data process made no rows: it hangs, or the storage does"
    assert project.check_hang(4, 2, "node3", cause, "restart")["phase"] == "data"
    assert project.began_at(4) is not None and project.attempts() == 5 and project.step() == STEPS
    project.check()


def test_doctor_examines_nodes_that_slurm_grants(slurm_lab: SlurmLab, project: Project) -> None:
    (project.folder / "profile.yaml").write_text(PROFILE.format(nodes=2, time="10", requeue="true"))
    command = (*DSTRAIN, "doctor", "tiny.yaml", "--on", "profile.yaml", "--json")
    result = json.loads(slurm_lab.run(*command, timeout_seconds=300).stdout)
    assert result["safe"] and set(result["nodes"]) == {"node1", "node2"}, result["findings"]
    (link,) = result["all_reduce_bytes_per_second"]
    assert link["speed"] > 1e6
    assert result["seconds"] < 60
