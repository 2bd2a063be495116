"""Each known cause is really brought about in a rank of a real attempt; the verdict has to know it, and its remedy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from provoked import CAUSES

pytestmark = pytest.mark.ranks
HERE = Path(__file__).parent

# cause: ranks, what the verdict says of it, a word of the remedy, the decision with restarts left
EXPECTED = {
    "occupied_port": (1, "another program holds the port of the process group", "another port", "restart"),
    "gloo_timeout": (2, "a rank waited too long for the others", "SIGUSR2", "restart"),
    "full_disk": (1, "the disk is full", "free some space", "restart"),
    "full_shared_memory": (1, "/dev/shm, the memory that processes share, is full", "--shm-size", "restart"),
    "shared_memory_bus_error": (1, "a mapped file lost its storage: /dev/shm is full", "df -h /dev/shm", "restart"),
    "missing_module": (1, "a Python package is missing where the ranks run", "install", "give up"),
    "missing_library": (1, "a shared library is missing where the ranks run", "install the library", "give up"),
    "mismatched_version": (1, "versions of packages that do not fit together", "constraints.txt", "give up"),
}


def test_every_cause_is_tried() -> None:
    assert set(EXPECTED) == set(CAUSES)


@pytest.mark.parametrize("cause", EXPECTED)
def test_a_provoked_failure_is_known(cause: str, tmp_path: Path) -> None:
    ranks, words, remedy, decision = EXPECTED[cause]
    script = {"1": {str(rank): [f"provoke {cause}"] for rank in range(ranks)}, "2": {}}
    (tmp_path / "script.json").write_text(json.dumps(script))
    done = subprocess.run(
        [sys.executable, str(HERE / "stand_in.py"), str(tmp_path), str(ranks), "1"],
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    verdict = json.loads((tmp_path / "attempts/0001/verdict.json").read_text())
    assert verdict["first"]["rank"] == 0
    assert verdict["cause"].startswith(words), done.stderr
    assert remedy in verdict["remedy"]
    assert verdict["decision"] == decision
    assert done.returncode == (0 if decision == "restart" else 1)  # the second attempt has nothing to do
    assert f"  cause     {words}" in done.stderr
