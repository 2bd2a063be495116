"""What the command line turns into an exit code. A user's mistake is never a traceback."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_RESTART_ME = 75  # stopped at a checkpoint and wants to be started again (EX_TEMPFAIL of sysexits.h)


class UserError(ValueError):
    """The input is wrong: recipe, files, hosts, disk. The message names place, rule and remedy; exit code 2."""

    blames_rank: int | None = None  # where it was found, if all ranks raise it together


class RecipeError(UserError):
    """One or more mistakes in a recipe, all reported together."""


class CorpusError(UserError):
    """Shards, an index or a sample that cannot be used as they are."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or belongs to something else."""
