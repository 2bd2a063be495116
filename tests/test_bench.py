"""The benchmarks of the data order run, in small."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

BENCH = Path(__file__).resolve().parent.parent / "tools" / "bench"


def lines_of(program: str, *options: str) -> Any:
    done = subprocess.run(
        [sys.executable, str(BENCH / program), "--quick", "--json", *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_stream_compares_this_project_with_others() -> None:
    contestants = ("dstrain", "dstrain-mixture", "webdataset")
    lines = lines_of("stream.py", "--only", *contestants)
    assert [line["contestant"] for line in lines] == list(contestants)
    assert lines[0]["dstrain_is_times_faster"] == 1
    assert all(line["million_tokens_per_second"] > 0 for line in lines)


def test_stream_measures_the_first_row_far_on() -> None:
    lines = lines_of("stream.py", "--resume")
    assert [line["background"] for line in lines] == [False, True]
    assert all(line["last ÷ step 0"] > 0 and line["seconds at step 1,000,000,000"] > 0 for line in lines)


def test_stream_says_where_to_put_environments() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "stream.py"), "--quick", "--only", "litdata"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "litdata has an environment of its own; say where: --peers build/peers --make-peers\n"


def test_shuffle_is_as_random_as_a_full_one() -> None:
    (order,), (hostile,) = lines_of("shuffle.py")
    assert order["spread ÷ random in lanes"] <= 1.1
    assert abs(order["two epochs"]) <= 0.1  # of 1,000 documents: three standard deviations of a full shuffle
    assert hostile["twice or more"] == "0.00%"
    assert float(hostile["of those trained on"][:-1]) == pytest.approx(100 * 2 / 3, abs=0.5)


def test_shuffle_measures_what_windows_cost() -> None:
    ((default, wide),) = lines_of("shuffle.py", "--cost", "--windows", "4")
    assert default["÷ default"] == 1 and wide["window blocks"] == 4


def test_growth_counts_the_first_row_and_the_memory() -> None:
    lines = lines_of("growth.py")
    assert [(line["step"], line["background"]) for line in lines] == [
        ("0", False),
        ("1,000,000,000", False),
        ("0", True),
        ("1,000,000,000", True),
    ]
    assert all(line["peak memory, MB"] >= line["of it imports"] for line in lines if not line["background"])
