"""Run a compiled pipeline in kfp.local exactly as it is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from kfp import components, local
from kfp.local import executor_input_utils

from pipelines.local import warm_worker
from pipelines.stores import environ
from tests.running import ROOT


def execute(ir: str, workdir: Path, *, apart: bool = False, cache: bool = True, **parameters: Any) -> dict[str, Any]:
    """The outputs of a pipeline; its artifacts lie in `workdir`/.vapo/artifacts, checkpoints in `workdir`/store.

    Args:
        apart: give every execution a folder of its own, as a cluster does. kfp.local names folders by component, so
            that in a merged pipeline one task would write over what another has left.
    """
    (workdir / "scratch").mkdir(parents=True, exist_ok=True)
    count = itertools.count()
    named = executor_input_utils.get_local_task_resource_name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local.config.LocalExecutionConfig, "instance", None)
        if apart:
            patch.setattr(
                executor_input_utils, "get_local_task_resource_name", lambda name: f"{named(name)}-{next(count):03d}"
            )
        local.init(
            runner=local.SubprocessRunner(use_venv=False),
            pipeline_root=str(workdir / ".vapo" / "artifacts"),
            enable_caching=cache,
            cache_root=str(workdir / "cache"),
        )
        variables = {"PYTHONPATH": str(ROOT), "TMPDIR": str(workdir / "scratch"), "OMP_NUM_THREADS": "1"}
        with environ(variables), warm_worker(workdir / "scratch", workdir / "worker.txt", True):
            outputs: dict[str, Any] = components.load_component_from_text(ir)(
                store=str(workdir / "store"), **parameters
            ).outputs
    return outputs
