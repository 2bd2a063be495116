"""What an attempt's ranks and launchers came to, as facts. `verdict_text.py` puts them into words."""

import re
import signal
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from dstrain.base.phases import RankPhase

RankNumber = Annotated[int, Field(ge=0)]
Step = Annotated[int, Field(ge=0)]

# What a rank says that lost a peer, in gloo's, NCCL's and the c10d store's words.
LOST_CONNECTION = re.compile(
    r"Connection (?:was )?(?:closed by|reset by|refused|aborted)|Broken pipe|pair closure|Socket (?:closed|Timeout)"
    r"|recvValue failed|failed to recv|remote process exited|ncclRemoteError|communicator was aborted"
    r"|(?:Timed out|timed out|Timeout) (?:waiting|after waiting)|collective operation timeout"
)


@dataclass(frozen=True)
class Hang:
    """That a rank stood still, and was killed for it by its node's watch."""

    phase: RankPhase
    seconds: Annotated[float, Field(ge=0)]  # for which it had stood still
    is_stopped: bool  # its process was, by SIGSTOP or a debugger
    step: Step = 0
    stack: tuple[str, ...] = ()  # where it stood, the innermost frame first


@dataclass(frozen=True)
class RankFailure:
    """One rank that did not end well; `rank` None stands for the agent that starts them.

    `exit_code` is negative for a signal, as in `subprocess`; None if unknown.
    """

    rank: RankNumber | None
    host: str
    exit_code: int | None
    time_unix: float
    kind: Literal["user", "exception"] | None = None  # None: it left no last words
    error_type: str | None = None
    message: str = ""
    phase: RankPhase | None = None
    step: Step | None = None
    log: str = ""
    log_tail: tuple[str, ...] = ()
    monotonic: float | None = None  # when, by the supervisor's monotonic clock: comparable between hosts
    blames_rank: int | None = None  # whose failure it reports, where all ranks learn of it together
    hang: Hang | None = None  # it stood still and was killed for that
    data_process_exit_code: int | None = None  # of its data process, whose death it reports
    out_of_memory: bool = False  # the kernel's log says that it killed this very process for memory

    @property
    def is_consequence(self) -> bool:
        """Whether it failed because another rank had failed (or was ended by the agent after that)."""
        if self.blames_rank is not None and self.blames_rank != self.rank:
            return True
        if self.kind == "user":
            return False
        if self.kind == "exception":
            was_ended = self.data_process_exit_code == -signal.SIGTERM
            return was_ended or LOST_CONNECTION.search(self.message) is not None
        if self.exit_code == -signal.SIGTERM:
            return True
        return self.exit_code == -signal.SIGABRT and LOST_CONNECTION.search("\n".join(self.log_tail)) is not None

    @property
    def is_lost_node(self) -> bool:
        """Whether a whole node ended without a word, so that others may do better."""
        return self.rank is None and self.kind is None
