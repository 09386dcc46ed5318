"""Makes a store's bucket where there is none: `python -m vapo.store.bucket minio://vapo`, for a new cluster."""

from __future__ import annotations

import sys

from vapo.errors import UserError
from vapo.store.connection import connect


def make_bucket(uri: str) -> bool:
    """Make the bucket of a URI; False: it is there already.

    Raises:
        UserError: the URI is malformed, variables are not set, or the server refuses or does not answer.
    """
    bucket = connect(uri)
    with bucket.told():
        if bucket.client.bucket_exists(bucket.name):
            return False
        bucket.client.make_bucket(bucket.name)
    return True


def main(arguments: list[str]) -> int:
    """Exit code: 0 the bucket is there, 2 what to cure is said on one line."""
    try:
        if len(arguments) != 1 or not arguments[0].startswith(("s3://", "minio://")):
            raise UserError(f"{' '.join(arguments)!r}: give one URI, say minio://vapo")
        made = make_bucket(arguments[0])
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{arguments[0]}: {'made' if made else 'is there'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
