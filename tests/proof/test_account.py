"""The account of a run's rows: right for whatever restarts and rollbacks can do, and not to be talked out of a gap."""

import json
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.checkpoint.manifest import Manifest, checkpoint_folder
from dstrain.cli import main
from dstrain.proof.account import Account, Dropped, Saved, account, account_of_ledger

ROWS = 8


class History:
    """What a run writes as it trains, saves, dies, resumes and rolls back."""

    def __init__(self) -> None:
        self.lines: list[dict[str, object]] = []
        self.step = self.data_step = 0
        self.saved: list[tuple[int, int]] = []  # (step, data step)
        self.dropped: list[tuple[int, int]] = []  # (data step, after step) that are gone for good
        self.rollbacks: set[int] = set()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step, self.data_step = self.step + 1, self.data_step + 1
            first = (self.data_step - 1) * ROWS
            self.lines.append({"step": self.step, "rows": [first, first + ROWS - 1], "digest": f"{first:032x}"})

    def skip(self) -> None:
        self.train(1)
        self.step -= 1
        self.lines[-1]["skipped"] = True
        self.dropped.append((self.data_step, self.step))

    def save(self) -> None:
        if self.step and self.step > self.saved_at[0]:
            self.saved.append((self.step, self.data_step))

    def die(self) -> None:
        self.step, self.data_step = self.saved_at
        self.dropped = [gone for gone in self.dropped if gone[0] <= self.data_step]

    def roll_back(self) -> None:
        if self.saved and self.step > self.saved_at[0]:
            self.step, first = self.saved_at
            self.dropped = [gone for gone in self.dropped if gone[0] <= first]
            self.dropped += [(n, self.step) for n in range(first + 1, self.data_step + 1)]
            self.rollbacks.add(self.step)

    @property
    def saved_at(self) -> tuple[int, int]:
        return self.saved[-1] if self.saved else (0, 0)

    def write(self, folder: Path) -> Path:
        path = folder / "ledger.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        return path

    def account(self, folder: Path) -> Account:
        step, data_step = self.saved_at
        saved = Saved(step, data_step * ROWS, folder / "newest") if self.saved else None
        return account_of_ledger(self.write(folder), saved, self.rollbacks)


def dropped_rows(found: Account) -> list[tuple[int, int]]:
    """(data step, after step) of every dropped global batch."""
    return [
        (batch + 1, dropped.after_step)
        for dropped in found.dropped
        for batch in range(dropped.rows[0] // ROWS, (dropped.rows[1] + 1) // ROWS)
    ]


EVENTS: st.SearchStrategy[list[int | str]] = st.lists(
    st.one_of(st.integers(1, 4), st.sampled_from(["save", "die", "roll back", "skip"])), max_size=25
)


def happened(events: list[int | str]) -> History:
    history = History()
    history.train(1)
    for event in events:
        if isinstance(event, int):
            history.train(event)
        else:
            {"save": history.save, "die": history.die, "roll back": history.roll_back, "skip": history.skip}[event]()
    history.train(1)
    if "skip" in events[-1:]:
        history.skip()  # the last thing that happened
    return history


@settings(deadline=None, max_examples=300)
@given(EVENTS)
@pytest.mark.slow
def test_restarts_and_rollbacks_are_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, events: list[int | str]
) -> None:
    history = happened(events)
    found = history.account(tmp_path_factory.mktemp("run"))
    assert found.problems == []
    assert (found.first_step, found.last_step) == (1, history.step)
    assert found.rows == (0, history.data_step * ROWS - 1)
    assert sorted(dropped_rows(found)) == sorted(history.dropped)
    counted = history.step + len(history.dropped) + found.repeated_steps
    assert counted == len(history.lines)  # each line is a step, dropped, or made again


@settings(deadline=None, max_examples=200)
@given(EVENTS.map(lambda events: [event for event in events if event not in ("roll back", "skip")]), st.data())
@pytest.mark.slow
def test_rows_that_are_lost_or_taken_twice_are_found(
    tmp_path_factory: pytest.TempPathFactory, events: list[int | str], data: st.DataObject
) -> None:
    """From some line on, all rows are shifted: a resume that skipped some, or took some twice."""
    history = happened(events)
    start = data.draw(st.integers(0, len(history.lines) - 1))
    shift = data.draw(st.sampled_from([-ROWS, ROWS, ROWS // 2]))
    for line in history.lines[start:]:
        first, last = line["rows"]  # type: ignore[misc]
        line["rows"] = [first + shift, last + shift]
    history.saved = []  # else the checkpoint tells at once
    assert history.account(tmp_path_factory.mktemp("run")).problems


def test_the_ways_to_lose_a_row(tmp_path: Path) -> None:
    def problems(history: History) -> list[str]:
        return history.account(tmp_path).problems

    history = History()
    history.train(6)
    assert problems(history) == []
    del history.lines[2]
    assert problems(history) == ["step 4 follows step 2"]

    history = History()
    history.train(3)
    history.data_step += 1  # a resume that loses a batch
    history.train(2)
    assert problems(history) == [
        "rows 24 to 31 were never consumed: step 3 ends at row 23, step 4 starts at row 32",
    ]

    history = History()
    history.train(3)
    history.data_step -= 1  # one that takes a batch twice
    history.train(2)
    assert problems(history) == ["rows 16 to 23 were consumed in step 3 and again after it"]

    history = History()
    history.train(3)
    history.save()
    history.train(2)
    history.step = 3  # looks like a rollback to step 3, but nothing says so
    history.train(1)
    assert problems(history) == [
        "rows 24 to 39 were dropped between steps 3 and 4, but metrics.jsonl has no rollback to step 3"
    ]
    history.rollbacks = {3}
    assert problems(history) == []
    assert history.account(tmp_path).dropped == [Dropped((24, 39), 3, rolled_back=True)]

    history = History()
    history.train(5)
    history.saved = [(4, 5)]  # would go on after a row that no step before it consumed
    assert problems(history) == [f"{tmp_path}/newest goes on with row 40, but step 4 ended at row 31"]
    history.saved = [(7, 7)]
    assert problems(history) == [f"{tmp_path}/newest is of step 7, but the ledger ends at step 5"]

    history = History()
    history.train(5)
    del history.lines[0]
    assert problems(history) == ["the ledger begins at step 2 with row 8, not at step 1 with row 0"]


def test_an_imported_run_begins_where_its_first_checkpoint_does(tmp_path: Path) -> None:
    history = History()
    history.step, history.data_step = 10, 4
    history.saved.append((10, 4))
    history.train(2)
    history.roll_back()
    history.train(1)
    path = history.write(tmp_path)
    saved = Saved(10, 4 * ROWS, tmp_path, began=(10, 4 * ROWS))
    found = account_of_ledger(path, saved, {10})
    assert (found.problems, found.first_step, found.rows) == ([], 11, (4 * ROWS, 7 * ROWS - 1))
    assert "no rollback to step 10" in account_of_ledger(path, saved, set()).problems[0]
    elsewhere = account_of_ledger(path, Saved(10, 4 * ROWS, tmp_path, began=(10, 3 * ROWS)), {10})
    assert "not at step 11 with row 24" in elsewhere.problems[0]


@pytest.mark.slow
def test_a_million_steps_take_seconds_and_no_memory(tmp_path: Path) -> None:
    steps = 100_000  # a tenth of it
    path = tmp_path / "ledger.jsonl"
    with path.open("w") as ledger:
        for step in range(1, steps + 1):
            ledger.write(f'{{"step": {step}, "rows": [{step * 8 - 8}, {step * 8 - 1}], "digest": "{step:032x}"}}\n')
    started = time.process_time()
    found = account_of_ledger(path, Saved(90_000, 90_000 * 8, tmp_path), set())
    assert (found.problems, found.last_step) == ([], steps)
    assert time.process_time() - started < 5


def test_memory_does_not_grow_with_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstrain.data.ledger.READ_BYTES", 1 << 14)

    def peak_bytes(steps: int) -> int:
        path = tmp_path / f"{steps}.jsonl"
        with path.open("w") as ledger:
            for step in range(1, steps + 1):
                ledger.write(f'{{"step": {step}, "rows": [{step * 8 - 8}, {step * 8 - 1}], "digest": "{step:032x}"}}\n')
        tracemalloc.start()
        try:
            assert account_of_ledger(path, Saved(steps, steps * 8, tmp_path), set()).problems == []
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_bytes(10)  # what is kept for good
    assert peak_bytes(20_000) < peak_bytes(2_000) + 20_000, "of a ledger of 2 MB"


# ------------------------------------------------------------------ folders and the command


def write_manifest(run_dir: Path, step: int, data_step: int) -> None:
    folder = checkpoint_folder(run_dir, step)
    folder.mkdir(parents=True)
    identity = {"global_batch_rows": ROWS}
    manifest = Manifest(step, data_step, step, 0, 0.0, {}, identity, {}, {}, {}, {})
    (folder / "manifest.json").write_text(manifest.text())


def test_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = History()
    history.train(4)
    history.save()
    history.train(3)
    history.roll_back()
    history.train(2)
    history.write(tmp_path)
    write_manifest(tmp_path, 4, 4)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 7, "rolled_back_to": 4}\n')
    assert account(tmp_path).problems == []
    assert main(["ledger", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/ledger.jsonl: each row consumed exactly once",
        "  steps        1 to 6, rows 0 to 71",
        "  checkpoint   the newest checkpoint is of step 4; 2 steps since",
        "  rolled back  rows 32 to 55, after step 4",
    ]
    (tmp_path / "metrics.jsonl").unlink()
    assert main(["ledger", str(tmp_path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == [
        "rows 32 to 55 were dropped between steps 4 and 5, but metrics.jsonl has no rollback to step 4"
    ]


def test_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run, digest in (("a", "d"), ("b", "d"), ("c", "e")):
        history = History()
        history.train(3)
        history.lines = [line | {"digest": digest} for line in history.lines]
        (tmp_path / run).mkdir()
        history.write(tmp_path / run)
    assert main(["ledger", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.endswith("b/ledger.jsonl: the same rows in all 3 common steps\n")
    assert main(["ledger", str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    assert capsys.readouterr().out.endswith("c/ledger.jsonl: other rows from step 1 on, of 3 common steps\n")
    assert main(["ledger", str(tmp_path / "a"), str(tmp_path / "c"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["last_step"], report["problems"], report["first_difference"]) == (3, [], 1)
    assert main(["ledger", str(tmp_path / "nowhere")]) == 2
    assert "there is no ledger; give the folder of a run" in capsys.readouterr().err
