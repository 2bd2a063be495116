"""A failure and a verdict in words: the one place where their facts become sentences."""

import signal

from dstrain.diagnose.failure import Hang, RankFailure
from dstrain.diagnose.verdict import Verdict

_LINE_CHARACTERS = 160


def failed(failure: RankFailure) -> str:
    """Who: `rank 1 on node7`."""
    who = "the launcher" if failure.rank is None else f"rank {failure.rank}"
    return f"{who} on {failure.host}" if failure.host else who


def how_it_failed(failure: RankFailure) -> str:
    """`ValueError: …`, `killed by SIGKILL`, `it stood still for 12 s in phase data, and was killed`, …"""
    if failure.error_type is not None:
        return f"{failure.error_type}: {failure.message.strip() or '(no message)'}"
    if failure.hang is not None:
        return _hang(failure.hang)
    if failure.message:
        return failure.message
    if failure.exit_code is None:
        return "ended without saying why"
    return ending(failure.exit_code)


def _hang(hang: Hang) -> str:
    how = "its process was stopped" if hang.is_stopped else "it stood still"
    return f"{how} for {hang.seconds:.0f} s in phase {hang.phase}, and was killed"


def verdict_line(verdict: Verdict) -> str:
    """`rank 1 on node2: it hangs; restart: 1 of 3`."""
    how = _first_line(verdict.cause or how_it_failed(verdict.first))
    return f"{failed(verdict.first)}: {how}; {verdict.decision}: {verdict.reason}"


def verdict_summary(verdict: Verdict) -> str:
    """As short as a table needs it: `rank 1: killed by SIGKILL (its data process made no rows): restart`."""
    first = verdict.first
    how = first.error_type or (ending(first.exit_code) if first.exit_code is not None else "ended")
    cause = f" ({verdict.cause.partition(':')[0]})" if verdict.cause else ""
    return f"rank {first.rank}: {how}{cause}: {verdict.decision}"


def ending(exit_code: int) -> str:
    """`killed by SIGKILL`, `exited with code 1`."""
    return f"killed by {signal_name(-exit_code)}" if exit_code < 0 else f"exited with code {exit_code}"


def verdict_text(verdict: Verdict) -> str:
    """All of it, over several lines, without a newline at the end."""
    first = verdict.first
    where = "" if first.step is None else f" at step {first.step:,}"
    if first.phase is not None:
        where += f", phase {first.phase}"
    lines = [f"attempt {verdict.attempt}: {failed(first)} failed first{where}"]
    lines += _field("what", how_it_failed(first))
    if verdict.cause:
        lines += _field("cause", verdict.cause)
    if verdict.remedy:
        lines += _field("remedy", verdict.remedy)
    if first.hang is not None and first.hang.stack:
        lines += _field("stack", "\n".join(first.hang.stack))
    if first.log:
        lines += _field("log", first.log)
        lines += [f"            | {line}" for line in first.log_tail]
    if verdict.consequences:
        earliest, *more = verdict.consequences
        others = f" (and {len(more)} more)" if more else ""
        lines += _field("after it", f"{failed(earliest)}: {_first_line(how_it_failed(earliest))}{others}")
    lines += _field("decision", f"{verdict.decision}: {verdict.reason}")
    return "\n".join(lines)


def signal_name(number: int) -> str:
    """`SIGKILL` for 9; `signal 200` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _first_line(text: str) -> str:
    line = text.splitlines()[0]
    return line if len(line) <= _LINE_CHARACTERS else line[: _LINE_CHARACTERS - 1] + "…"


def _field(name: str, text: str) -> list[str]:
    first, *rest = text.splitlines()
    return [f"  {name:<9} {first}", *(f"            {line}" for line in rest)]
