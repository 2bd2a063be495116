"""`dstrain monitor`: replays are exact, a pipe is answered while it is open, and a bad line is passed over."""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from word_classifier import sentence, write_classifier

from dstrain.errors import UserError
from dstrain.predict.items import Item
from dstrain.predict.monitor import (
    as_text,
    items_at_hand,
    message_time,
    monitor_command,
    negative_label,
    read_topics,
)
from dstrain.predict.surges import Message, Rule, changes

pytestmark = pytest.mark.slow

MINUTE = 60.0
START = 1_795_000_000.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("classifier"), ("good", "bad"))


def stream() -> list[dict[str, Any]]:
    """Four hours of messages a minute apart, each fifth bad; in the last half hour all about the courier are."""
    lines = []
    for n in range(240):
        surge = n >= 210 and n % 2 == 0
        label = "bad" if surge or n % 5 == 0 else "good"
        text = f"courier {sentence(label, n)}" if n % 2 == 0 else f"price {sentence(label, n)}".replace("courier", "my")
        lines.append({"text": text, "time": START + n * MINUTE, "bad": label == "bad"})
    return lines


def arguments(model: Path, file: Path, **given: Any) -> Namespace:
    keys: dict[str, Any] = {"negative": "bad", "topics": None, "replay": True, "json": True, "text_field": None}
    keys |= {"window_minutes": 30.0, "baseline_minutes": 180.0, "least": 5, "begin": 1e-4, "end": 0.05}
    return Namespace(model=str(model), file=str(file), batch_rows=7, **(keys | given))


def test_a_replay_says_what_the_messages_say(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, topics = tmp_path / "stream.jsonl", tmp_path / "topics.txt"
    file.write_text("".join(json.dumps(line) + "\n" for line in stream()))
    topics.write_text("# what people write about\ndelivery: courier, parcels\nprice: price, 价格\n")
    assert monitor_command(arguments(model, file, topics=str(topics))) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    topics_of = read_topics(topics)
    messages = [Message(line["time"], topics_of(line["text"]), line["bad"], line["text"]) for line in stream()]
    expected = list(changes(messages, Rule(1800.0, 10800.0, 5, 1e-4, 0.05)))
    kept = ("topic", "begins", "negatives", "messages", "negatives_before", "messages_before", "p")
    assert [{name: line[name] for name in kept} for line in found] == [
        {name: getattr(change, name) for name in kept} for change in expected
    ]
    assert [(line["topic"], line["begins"]) for line in found if line["topic"] == "delivery"] == [("delivery", True)]
    assert not [line for line in found if line["topic"] == "price"]
    assert found[0]["time"].endswith("Z")


def test_bad_lines_are_counted_and_passed_over(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "stream.jsonl"
    bad = [b"\xff\xfe\n", b"not json\n", b'{"txt": 1}\n', b'{"text": "nice", "time": "soon"}\n', b"\n"]
    good = [json.dumps(line).encode() + b"\n" for line in stream()]
    file.write_bytes(b"".join([good[0], *bad, *good[1:]]))
    assert monitor_command(arguments(model, file, json=False)) == 0
    out, err = capsys.readouterr()
    assert "245 lines, 5 of them bad; " in err.splitlines()[-1]
    assert [line.split(": ")[0] for line in err.splitlines() if "passed over" in line] == ["passed over"] * 5
    assert f'{file}:5: time is "soon"; a replay needs seconds since 1970 or ISO 8601' in err
    alerts = [line for line in out.splitlines() if " ALERT " in line]
    assert len(alerts) == 1
    assert " ALERT all: " in alerts[0]


def test_an_open_pipe_is_answered_until_ctrl_c(model: Path) -> None:
    """The alert comes while the writer is still there, as with `tail -f`; what was read until Ctrl-C is counted."""
    command = [sys.executable, "-m", "dstrain", "monitor", str(model), "--negative", "bad", "--json", "--replay"]
    options = ["--window-minutes", "30", "--baseline-minutes", "180", "--least", "5"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def heed_ctrl_c() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it for what it runs in the background

    with subprocess.Popen([*command, *options], env=environment, preexec_fn=heed_ctrl_c, **pipes) as live:
        assert live.stdin is not None
        assert live.stdout is not None
        try:
            for line in stream():
                live.stdin.write(json.dumps(line).encode() + b"\n")
            live.stdin.flush()
            ready, _, _ = select.select([live.stdout], [], [], 300)
            assert ready, "nothing was said while the pipe was open"
            first = json.loads(live.stdout.readline())
            assert (first["topic"], first["begins"]) == ("all", True)
            code = None
            while code is None:  # the first was not heard twice, in runs of all tests side by side; why is not known
                live.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = live.wait(20)
            assert code == 130
            assert live.stderr is not None
            last = live.stderr.read().decode().splitlines()[-1]
            counted = re.fullmatch(r"(\d+) lines, 0 of them bad; (\d+) negative; 1 surges", last)
            assert counted is not None, last
            lines, negative = map(int, counted.groups())
            assert 215 < lines <= 240
            assert negative == sum(line["bad"] for line in stream()[:lines])
        finally:
            live.kill()


def test_the_example_of_the_guide_is_what_its_messages_say() -> None:
    folder = Path(__file__).parents[2] / "docs" / "applications"
    topics_of = read_topics(folder / "topics.txt")
    messages = []
    for line in map(json.loads, (folder / "messages.jsonl").read_text().splitlines()):
        when = message_time(Item("", given=line), 0.0, replay=True)
        assert isinstance(when, float)
        messages.append(Message(when, topics_of(line["text"]), line["label"] == "0", line["text"]))
    said = "".join(as_text(change, Rule()) + "\n" for change in changes(messages, Rule()))
    assert f"```\n{said}```" in (folder / "sentiment-monitoring.md").read_text()


def test_a_batch_is_what_is_at_hand() -> None:
    one, two, three = ((Item(str(n), ("x",)), 0.0) for n in range(3))
    assert list(items_at_hand(iter([None, one, None, two, three, None]), 2)) == [[one], [two, three]]
    assert list(items_at_hand(iter([one, two, three]), 2)) == [[one, two], [three]]
    assert list(items_at_hand(iter([]), 2)) == []


@pytest.mark.parametrize("given", [0, 1_764_151_200, "1764151200", "2025-11-26T10:00:00Z", "2025-11-26 11:00:00+01:00"])
def test_times_are_seconds_or_iso_8601(given: Any) -> None:
    expected = 0.0 if given == 0 else 1_764_151_200.0
    assert message_time(Item("", given={"time": given}), 5.0, replay=True) == expected
    assert message_time(Item("", given={"time": given}), 5.0, replay=False) == 5.0


@pytest.mark.parametrize("given", [None, True, "soon", [1], float("nan"), "9" * 400])
def test_other_times_are_refused(given: Any) -> None:
    assert str(message_time(Item("", given={"time": given}), 5.0, replay=True)).startswith("time is ")


def test_topics_are_whole_words_but_in_chinese(tmp_path: Path) -> None:
    path = tmp_path / "topics.txt"
    path.write_text("delivery: late, on the way, 快递\nprice: $, cheap\n")
    topics = read_topics(path)
    assert topics("It is LATE, and not cheap") == ("delivery", "price")
    assert topics("我的快递呢") == ("delivery",)
    assert topics("chocolate, cheaper") == ()
    path.write_text("delivery: late\nprices\n")
    with pytest.raises(UserError, match=r"topics\.txt:2: no topic with its words; write it as in `delivery: late"):
        read_topics(path)
    path.write_text("# nothing\n")
    with pytest.raises(UserError, match="names no topic"):
        read_topics(path)
    with pytest.raises(UserError, match="No such file"):
        read_topics(tmp_path / "absent.txt")


def test_the_negative_label_is_known_or_asked_for() -> None:
    assert negative_label(["Negative", "positive"], None) == "Negative"
    assert negative_label(["0", "1"], "0") == "0"
    with pytest.raises(UserError, match="not known; give --negative with one of: 0, 1"):
        negative_label(["0", "1"], None)
    with pytest.raises(
        UserError, match="--negative bad is no label of the model; give --negative with one of: neg, pos"
    ):
        negative_label(["neg", "pos"], "bad")


def test_a_rule_that_makes_no_sense_is_refused(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "absent.jsonl"
    for given, message in [
        ({"window_minutes": 0.0}, "give more than 0"),
        ({"baseline_minutes": 10.0}, "--baseline-minutes 10 is less than --window-minutes 30"),
        ({"begin": 0.1}, "--begin 0.1 and --end 0.05: give probabilities, the first the smaller"),
        ({"least": 0}, "give 1 or more"),
        ({}, "absent.jsonl: No such file"),
    ]:
        with pytest.raises(UserError, match=message):
            monitor_command(arguments(model, file, **given))
