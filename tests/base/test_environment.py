"""The one reader of environment variables, and what of them may be recorded."""

import os
from pathlib import Path

import pytest

from dstrain.base import environment
from dstrain.errors import UserError


def test_only_what_decides_how_a_run_goes_is_recorded() -> None:
    shown = environment.recordable(
        {
            "HF_TOKEN": "hf_abc",
            "aws_secret_access_key": "abc",
            "NOBODY_KNOWS_THIS": "abc",
            "MY_PROXY": "http://me:abc@proxy:3128/",
            "SLURM_JWT_KEY": "abc",
            "NCCL_NET": "http://me:abc@fabric/",
            "PWD": "/home/me",
            "OMP_NUM_THREADS": "2",
            "TOKENIZERS_PARALLELISM": "false",
        }
    )
    assert shown == {
        "NCCL_NET": "http://(redacted)@fabric/",
        "OMP_NUM_THREADS": "2",
        "PWD": "/home/me",
        "SLURM_JWT_KEY": "(redacted)",
        "TOKENIZERS_PARALLELISM": "false",
    }
    assert list(shown) == sorted(shown)


def test_a_rank_knows_itself_by_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert environment.RankVariables.read() is None
    with pytest.raises(UserError, match="RANK is not set: start ranks through `dstrain run`"):
        environment.RankVariables.require()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert environment.RankVariables.require() == environment.RankVariables(3, 8, 1, 8)
    monkeypatch.setenv("LOCAL_RANK", "one")
    with pytest.raises(UserError, match="LOCAL_RANK=one"):
        environment.RankVariables.read()


def test_a_child_gets_the_environment_less_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    monkeypatch.setenv("KEPT", "yes")
    given = environment.for_child({"ADDED": "1", "KEPT": "no"}, without="SBATCH_")
    assert "SBATCH_PARTITION" not in given
    assert (given["ADDED"], given["KEPT"], os.environ["KEPT"]) == ("1", "no", "yes")
    assert environment.for_child() == dict(os.environ)


def test_defaults_leave_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET_ALREADY", "mine")
    monkeypatch.setenv("NOT_SET_YET", "")
    monkeypatch.delenv("NOT_SET_YET")
    environment.set_defaults({"SET_ALREADY": "ours", "NOT_SET_YET": "ours"})
    assert (os.environ["SET_ALREADY"], os.environ.pop("NOT_SET_YET")) == ("mine", "ours")


def test_the_cache_goes_by_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environment.cache_home() == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert environment.cache_home() == tmp_path / ".cache"


def test_devices_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment.visible_devices() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment.visible_devices() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-12")
    assert environment.visible_devices() == ["0", "GPU-12"]
