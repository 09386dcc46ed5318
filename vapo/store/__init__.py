"""Where bytes live: checkpoints are small manifests, their files content-addressed objects in a folder or a bucket."""

from vapo.store.checkpoints import (
    check_store,
    model_only,
    open_checkpoint,
    save_checkpoint,
    store_files,
)
from vapo.store.manifest import OPTIMIZER, Manifest, StoredFile, read_manifest, sha256_of, write_manifest
from vapo.store.objects import object_store

__all__ = [
    "OPTIMIZER",
    "Manifest",
    "StoredFile",
    "check_store",
    "model_only",
    "object_store",
    "open_checkpoint",
    "read_manifest",
    "save_checkpoint",
    "sha256_of",
    "store_files",
    "write_manifest",
]
