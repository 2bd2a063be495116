from pathlib import Path

from dstrain.transport.command import Job, command, record, with_users_choice


def test_one_rank_is_started_directly() -> None:
    shell = command(
        Job("a", Path("/runs/it's"), 1), 1, "/bin/python", cores=8, port=4711, supervisor_pid=None
    ).as_shell()
    assert (
        shell
        == """\
export DSTRAIN_ATTEMPT='/runs/it'"'"'s/attempts/0001'
export GLOO_SOCKET_IFNAME=lo
export LOCAL_RANK=0
export LOCAL_WORLD_SIZE=1
export MASTER_ADDR=127.0.0.1
export MASTER_PORT=4711
export OMP_NUM_THREADS=8
export RANK=0
export WORLD_SIZE=1
/bin/python -u -m dstrain.rank --run-dir '/runs/it'"'"'s' --attempt 1 --entry dstrain.train.main:run_rank"""
    )


def test_several_ranks_are_started_by_the_elastic_agent() -> None:
    shell = command(Job("a", Path("/runs/a"), 4), 12, "/bin/python", cores=10, port=4711, supervisor_pid=99).as_shell()
    assert (
        shell
        == """\
export DSTRAIN_ATTEMPT=/runs/a/attempts/0012
export GLOO_SOCKET_IFNAME=lo
export OMP_NUM_THREADS=2
/bin/python -u -m dstrain.agent.agent --run-dir /runs/a --attempt 12 --entry dstrain.train.main:run_rank \
--parent-pid 99 --ranks 4 --shutdown-timeout 600"""
    )


def test_a_rank_has_at_least_one_thread_and_the_users_own_number_stays() -> None:
    launch = command(Job("a", Path("/runs/a"), 4), 1, "python", cores=2, port=1, supervisor_pid=None)
    assert launch.environment["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in with_users_choice(launch, {"OMP_NUM_THREADS": "3"}).environment


def test_the_record_holds_what_is_needed_to_start_it_again() -> None:
    launch = command(Job("a", Path("/runs/a"), 1), 1, "python", cores=2, port=1, supervisor_pid=None)
    content = record(launch, {"PATH": "/bin", "RANK": "7", "API_KEY": "x"}, "/home/me")
    assert content["cwd"] == "/home/me"
    assert content["argv"][:4] == ["python", "-u", "-m", "dstrain.rank"]
    assert content["environment"]["RANK"] == "0"
    assert content["environment"]["PATH"] == "/bin"
    assert content["environment"].keys().isdisjoint({"API_KEY"})
