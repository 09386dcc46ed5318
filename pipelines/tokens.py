"""Where the token for a Kubeflow Pipelines server comes from; it is never printed and never written down."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH

from vapo.errors import UserError

TOKEN, TOKEN_FILE = "VAPO_KFP_TOKEN", "VAPO_KFP_TOKEN_FILE"


class Token:
    """kfp's credentials: it asks before every request, so that a file which is renewed while we wait stays valid."""

    def __init__(self, source: str, read: Callable[[], str]) -> None:
        self.source, self._read = source, read
        self.value()

    def value(self) -> str:
        """The token as it is now.

        Raises:
            UserError: it cannot be read, or is none; the message does not hold it.
        """
        try:
            found = self._read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the token of {self.source} cannot be read ({type(error).__name__}): check it") from None
        # A header takes no other characters, and the HTTP library's complaint would show the token.
        if not found.isascii() or not found.isprintable() or " " in found or not found:
            raise UserError(
                f"the token of {self.source} is empty, or holds blanks, line breaks or the like: give a bearer token"
            )
        return found

    def refresh_api_key_hook(self, config: Any) -> None:
        """As kfp's `TokenCredentialsBase` has it."""
        config.api_key["authorization"] = self.value()

    def hidden(self, text: str) -> str:
        """The text without the token, should a server send it back."""
        return text.replace(self.value(), "***")


def find_token(path: str = "") -> Token | None:
    """The token of `path`, else of the environment, else of the pod's service account; None: there is none.

    Raises:
        UserError: what was named cannot be read.
    """
    if path:
        return _in_file(path, "--token-file")
    if TOKEN in os.environ:
        return Token(TOKEN, lambda: os.environ[TOKEN])
    if TOKEN_FILE in os.environ:
        return _in_file(os.environ[TOKEN_FILE], TOKEN_FILE)
    projected = os.environ.get(KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH)
    return _in_file(projected, "the service account") if Path(projected).is_file() else None


def _in_file(path: str, source: str) -> Token:
    return Token(f"{source} ({path})", lambda: Path(path).read_text(encoding="utf-8"))
