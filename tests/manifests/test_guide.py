"""What docs/cluster.md and the recipes say of the cluster is what the manifests have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from manifests.references import GUIDE, documented_secrets
from manifests.render import ROOT, Object, rendered
from vapo.recipe import RECIPES, Recipe, load_recipe


@pytest.fixture(scope="module")
def guide() -> str:
    return GUIDE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def everything() -> list[Object]:
    return rendered(ROOT / "overlays" / "s3")


def first_gpu(guide: str, folder: Path) -> Recipe:
    found = re.search(r"`first-gpu\.toml`.*?```toml\n(.*?)```", guide, re.DOTALL)
    assert found
    path = folder / "first-gpu.toml"
    path.write_text("\n".join(line.strip() for line in found[1].splitlines()), encoding="utf-8")
    return load_recipe(str(path))


def test_its_recipe_asks_for_gpus_and_for_what_is_there(guide: str, tmp_path: Path) -> None:
    recipe = first_gpu(guide, tmp_path)
    objects = rendered(ROOT / "overlays" / "gpu")
    launcher = next(o for o in objects if o["metadata"]["name"] == "kfp-launcher")
    bucket = re.match(r"minio://\w+/", recipe.runtime.store)
    assert bucket
    assert launcher["data"]["defaultPipelineRoot"].startswith(bucket[0])
    assert recipe.runtime.secret in documented_secrets(guide)
    quota = next(o for o in objects if o["kind"] == "ResourceQuota")["spec"]["hard"]
    for stage in ("value_pretraining", "ppo_update"):
        asked = recipe.resources.of(stage)
        assert 1 <= asked.accelerators <= int(quota[f"requests.{asked.accelerator}"])


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_recipes_name_what_is_there(name: str, guide: str, everything: list[Object]) -> None:
    """Secrets, cache volumes, queues and training runtimes of every recipe that names one."""
    there = {(thing["kind"], thing["metadata"]["name"]) for thing in everything}
    recipe = load_recipe(name)
    assert {recipe.runtime.secret, recipe.train.secret} - {""} <= documented_secrets(guide).keys()
    assert ("TrainingRuntime", recipe.train.runtime) in there
    assert recipe.train.namespace == ""
    queues = {recipe.train.queue} - {""}
    for stage in type(recipe.resources).model_fields:
        asked = getattr(recipe.resources, stage)
        queues |= {asked.queue} - {""}
        assert not asked.cache_volume or ("PersistentVolumeClaim", asked.cache_volume) in there
    assert {("LocalQueue", queue) for queue in queues} <= there


def test_its_numbers_are_those_of_the_check(guide: str) -> None:
    seen = re.search(r"`overlays/(\w+): (\d+) objects, 0 faults`", guide)
    assert seen
    assert len(rendered(ROOT / "overlays" / seen[1])) == int(seen[2])


def test_files_and_folders_that_it_names_are_there(guide: str) -> None:
    named = set(re.findall(r"`(?:manifests/)?((?:base|components|overlays|files)/[\w/.-]*)`", guide))
    assert len(named) > 8
    assert [path for path in sorted(named) if not (ROOT / path).exists() and not (ROOT.parent / path).exists()] == []
