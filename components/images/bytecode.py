"""Run while an image is built: compiles what its stages import, by importing it, so that no container does it again."""

import compileall
import importlib
from importlib.util import find_spec
from pathlib import Path

import vapo.cli
import vapo.lineage.record
import vapo.worker

# What stages import when they need it; an image holds some of them.
LATER = (
    *("minio", "plotly", "safetensors.torch", "tensorboard.compat.proto", "math_verify", "reasoning_gym"),
    *("deepspeed", "peft", "kubeflow.trainer"),
)
UNIMPORTED = "vllm"  # it asks for a device when it is imported; none is there during a build


def main() -> None:
    """Import, or compile where importing wants a machine of another kind."""
    vapo.worker.preload()
    for name in ("kfp.dsl.executor_main", *LATER):
        if find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    found = find_spec(UNIMPORTED)
    if found and found.origin:
        compileall.compile_dir(Path(found.origin).parent, quiet=1, workers=0)


if __name__ == "__main__":
    main()
