"""Which errors are the user's to cure."""

from __future__ import annotations

import errno

import pytest

from vapo.errors import UserError, as_user_error


def test_a_user_error_stays_itself() -> None:
    error = UserError("x = 3: give 4")
    assert as_user_error(error) is error


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "/data/x"),
        (OSError(errno.ENOSPC, "Quota"), "the disk of the working directory"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk of the working directory"),
    ],
)
def test_a_full_disk_is_the_users_whoever_met_it(error: Exception, place: str) -> None:
    cure = as_user_error(error)
    assert isinstance(cure, UserError)
    assert place in str(cure)
    assert "free some space" in str(cure)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        KeyError("x"),
        OSError(errno.EACCES, "denied", "/x"),
        FileNotFoundError("x"),
        KeyboardInterrupt(),
    ],
)
def test_everything_else_is_ours(error: BaseException) -> None:
    assert as_user_error(error) is None
