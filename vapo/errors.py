"""The exceptions with a meaning at the command line: wrong input (2), a stage failed (1), Ctrl-C left it (130)."""

from __future__ import annotations

import errno

DISK_FULL = "No space left on device"


class UserError(ValueError):
    """Something the user can cure: one line with the value, where it stands and the cure (exit code 2)."""


class StageFailed(RuntimeError):
    """A stage failed for a reason that is not the user's; the message says which and where its traceback is."""


class Detached(Exception):
    """Ctrl-C ended the watching, not what is watched: it runs elsewhere; the message says how to come back to it."""


def as_user_error(error: BaseException) -> UserError | None:
    """The `UserError` that `error` amounts to, or None if it is a fault of ours.

    A full disk counts as the user's to cure whichever library met it: pyarrow and Python raise
    OSError with errno ENOSPC, safetensors an error of its own that carries the system's text.
    """
    if isinstance(error, UserError):
        return error
    if getattr(error, "errno", None) == errno.ENOSPC or DISK_FULL in str(error):
        place = getattr(error, "filename", None) or "the disk of the working directory"
        return UserError(
            f"no space left on {place}: free some space and run the same command again; finished stages are kept"
        )
    return None
