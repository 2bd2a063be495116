"""A tiny run through `dstrain run --on PROFILE` on a lab, and what each test checks of it."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.data.ledger import compare_ledgers
from dstrain.proof.account import account

STEPS = 80
DSTRAIN = (sys.executable, "-m", "dstrain")
SECRET = "sk-123"
HANG_SECONDS = 20  # longer than any phase takes on a busy machine


@dataclass
class Project:
    """A folder with tiny.yaml, and an uninterrupted run of it by a single process to compare with."""

    folder: Path
    reference: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / "it's ünï"

    def command(self, profile: str, *words: str) -> list[str]:
        (self.folder / "profile.yaml").write_text(profile)
        return [*DSTRAIN, "run", "tiny.yaml", "--on", "profile.yaml", "--run-dir", str(self.run_dir), *words]

    def step(self) -> int:
        """The last step in the ledger."""
        file = self.run_dir / "ledger.jsonl"
        return json.loads(file.read_text().splitlines()[-1])["step"] if file.exists() and file.stat().st_size else 0

    def ledger_lines(self) -> int:
        """How many steps were made, those counted that were made again."""
        file = self.run_dir / "ledger.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def attempts(self) -> int:
        return len(list((self.run_dir / "attempts").glob("*/command.json")))

    def of_attempt(self, number: int, file: str) -> dict[str, Any]:
        content = json.loads((self.run_dir / f"attempts/{number:04d}" / file).read_text())
        assert isinstance(content, dict)
        return content

    def began_at(self, number: int) -> int | None:
        """The checkpoint from which an attempt went on."""
        step: int | None = self.of_attempt(number, "command.json")["checkpoint_before"]
        return step

    def hosts_of(self, number: int) -> set[str]:
        """The hosts that an attempt had ranks on."""
        return {file.parent.name for file in self.run_dir.glob(f"attempts/{number:04d}/logs/*/rank-*.log")}

    def check_hang(self, attempt: int, rank: int, host: str, cause: str, decision: str) -> dict[str, Any]:
        """That this rank is named with its phase and stack, all of its threads' on file; its entry of the verdict."""
        verdict = self.of_attempt(attempt, "verdict.json")
        first: dict[str, Any] = verdict["first"]
        assert (first["rank"], first["host"]) == (rank, host)
        assert (verdict["cause"], verdict["decision"]) == (cause, decision)
        assert first["phase"] and first["hang"]["stack"]
        stacks = (self.run_dir / f"attempts/{attempt:04d}/hangs/rank-{rank:05d}.txt").read_text()
        assert "MainThread\n    " in stacks  # read by py-spy, from outside
        return first

    def check(self) -> None:
        """Done, with the rows of the uninterrupted single process, each once, and its loss; no secret on the disk."""
        assert self.of_attempt(self.attempts(), "outcome.json")["outcome"] == "done"
        comparison = compare_ledgers(self.run_dir / "ledger.jsonl", self.reference / "ledger.jsonl")
        assert comparison.common_steps == STEPS and comparison.first_difference is None
        assert account(self.run_dir).problems == []
        assert abs(final_loss(self.run_dir) - final_loss(self.reference)) < 1e-4
        files = [file for file in self.folder.rglob("*") if file.is_file()]
        assert not any(SECRET in file.read_text(errors="replace") for file in files)


def final_loss(run_dir: Path) -> float:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return float(next(line["loss"] for line in reversed(lines) if line["step"] == STEPS and "loss" in line))


def wait_until(condition: Callable[[], object], seconds: float, words: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain\n{words()}"
        time.sleep(0.1)
