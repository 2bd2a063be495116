"""What a rank does at any moment: the phases of its work, and what is known of each.

Status files, heartbeats and drills hold a phase by its value, as `save:vote`.
"""

from enum import StrEnum


class RankPhase(StrEnum):
    """A stretch of a rank's work that it announces as it begins."""

    STARTING = "starting"
    LOAD = "load"
    DATA = "data"  # waiting for its own data process
    AGREE = "agree"  # with the other ranks, on what the step is
    FORWARD = "forward"
    BACKWARD = "backward"
    STEP = "step"  # the optimizer's
    MADE = "made"  # a global step is over
    BETWEEN_STEPS = "between steps"  # in debug runs
    EVALUATE = "evaluate"
    SAVE_BEGIN = "save:begin"
    SAVE_COPY = "save:copy"
    SAVE_STAGE = "save:stage"
    SAVE_WRITE = "save:write"
    SAVE_VOTE = "save:vote"
    SAVE_COMMIT = "save:commit"
    SAVE_RENAME = "save:rename"
    SAVE_LATEST = "save:latest"
    SAVE_PRUNE = "save:prune"
    SAVED = "saved"
    DONE = "done"
    STOPPED = "stopped"
    ENDED = "ended"  # the process is gone

    @property
    def waits_for_no_rank(self) -> bool:
        """Whether a rank that stands still in it is to blame itself, whatever the others do."""
        return self is RankPhase.DATA

    @property
    def is_own_time(self) -> bool:
        """Whether its time is the rank's own, so that a slower one is a straggler.

        Under ZeRO stage 3 the forward pass gathers weights: it may stand still for another rank, and is still mostly
        the rank's own time.
        """
        return self in (RankPhase.DATA, RankPhase.FORWARD)

    @property
    def is_step_of_save(self) -> bool:
        """Whether it is one of those that a save goes through; in which training itself only waits."""
        return self.value.startswith("save:")
