"""Records: a published schema, the run in a URI, and what of them fits into the metadata of artifacts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf import json_format, struct_pb2
from jsonschema import Draft202012Validator

from pipelines.compiling import compile_pipeline
from tests.lineage.conftest import Made
from tests.running import ROOT
from vapo.lineage.record import IN_METADATA, Product, Record, Source, in_metadata, read_record, run_of, schema
from vapo.recipe import Recipe, load_recipe
from vapo.schemas import EXPERIENCE, REWARDS, ROLLOUTS
from vapo.stage import STAGES, bearer
from vapo.tables import write_table

PUBLISHED = ROOT / "docs" / "record.schema.json"
RUN = "5f0c1f9e-2b7a-4a52-9d7e-0d5b7a3c9e11"
SALT = "c1c9a8de-8f5e-4b44-b9a3-4bfa2a1f3f6e"
ARGUMENT = 128 << 10  # bytes of one argument of a process, by Linux: MAX_ARG_STRLEN


def test_the_published_schema_is_that_of_the_code() -> None:
    """`python -m vapo.lineage.record > docs/record.schema.json`"""
    assert json.loads(PUBLISHED.read_text()) == schema()
    Draft202012Validator.check_schema(schema())


def test_records_keep_to_the_schema_and_others_do_not(made: Made) -> None:
    validator = Draft202012Validator(json.loads(PUBLISHED.read_text()))
    found = [json.loads(path.read_text()) for path in made.root.glob("*/*/record.json")]
    assert len(found) == 6
    for record in found:
        validator.validate(record)
        for change in ({"format": 4}, {"stage": None}, {"surprise": 1}, {"outputs": {"x": {"sha256": "1"}}}):
            assert not validator.is_valid({**record, **change}), change


@pytest.mark.parametrize(
    ("uri", "run"),
    [
        (f"minio://mlpipeline/v2/artifacts/vapo-demo/{RUN}/rollout/{SALT}/rollouts", RUN),
        (f"s3://b/vapo-demo/{RUN}/rollout/rollouts", RUN),  # before the driver salted
        ("/work/runs/.vapo/artifacts/vapo-tiny-2026-11-22-22-46-39-863544/base-model/policy", ...),
        ("store://prompts", ""),
        ("", ""),
        ("policy", ""),
    ],
)
def test_the_run_stands_in_the_uri_of_an_output(uri: str, run: str) -> None:
    assert run_of(uri) == ("vapo-tiny-2026-11-22-22-46-39-863544" if run is ... else run)


def test_a_record_of_the_format_before_is_read(made: Made) -> None:
    path = made.root / "run" / "problems" / "record.json"
    data = json.loads(path.read_text())
    old = {key: value for key, value in data.items() if key not in ("run", "parents")} | {"format": 2}
    for output in old["outputs"].values():
        del output["tokens"]
    path.write_text(json.dumps(old))
    assert read_record(path).parents == ()


def test_tokens_of_responses_are_counted(made: Made) -> None:
    path = made.write("counted/rollouts", "")
    tables = {"rollouts": (ROLLOUTS, 5), "experience": (EXPERIENCE, 5), "rewards": (REWARDS, None)}
    for name, (table, _) in tables.items():
        columns = {field.name: _two_rows(field.name, field.type) for field in table}
        write_table(path.with_name(name), table, columns)
    outputs = made.task("counted", {}, started=9.0).record.outputs
    assert {name: (outputs[name].rows, outputs[name].tokens) for name in tables} == {
        name: (2, tokens) for name, (_, tokens) in tables.items()
    }


def _two_rows(name: str, kind: Any) -> list[Any]:
    if str(kind).startswith("list"):
        return [[1, 2, 3, 4, 5, 6], [1]] if name == "prompt_tokens" else [[1, 2, 3], [4, 5]]
    return {"string": ["a", "b"], "bool": [True, False]}.get(str(kind), [1, 2])


# Metadata


def long_record(**settings: Any) -> Record:
    """A record of a cluster's ppo_update: long URIs, many metrics."""
    place = f"s3://a-bucket-with-a-long-name/team/project/artifacts/vapo-qwen2-5-32b-aime/{RUN}/ppo-update-2/{SALT}"
    part = {"path": place.replace("://", "/"), "uri": place, "sha256": "0" * 64, "bytes": 10**12}
    names = ("rollouts", "rewards", "experience", "policy", "reference", "critic")
    return Record(
        **{
            "stage": "ppo_update",
            "iteration": 3,
            "purpose": "",
            "seed": 1,
            "parameters": {"seed": 1},
            "section": {},
            "section_sha256": "0" * 64,
            "parents": ("0" * 64,) * 6,
            "run": RUN,
            "inputs": {name: Source(**part, record="0" * 64) for name in names},
            "outputs": {name: Product(**part) for name in ("new_policy", "new_critic", "metrics")},
            "metrics": {f"metric_number_{i}": 0.123456789 for i in range(30)},
            "started": 1e9,
            "ended": 1e9,
            "seconds": 1.0,
            "vapo": "0.1",
            "commit": "0" * 40,
            "image": "i" * 150,
            "python": "3.11",
            "libraries": {},
            "host": {"name": "n", "machine": "m", "cpus": 1},
            **settings,
        }
    )


def test_a_record_that_is_too_long_says_what_is_left_out() -> None:
    assert "left_out" not in in_metadata(long_record(metrics={}))
    assert in_metadata(long_record())["left_out"] == ["metrics"]  # which the metrics' own metadata holds
    families = {f"family_{i}": {"parameter": 12345} for i in range(200)}
    short = in_metadata(long_record(section={"families": families}))
    assert short["left_out"] == ["metrics", "section"]
    assert short["section_sha256"]
    assert short["seed"] == 1
    everything = long_record(
        section={"x": "x" * 9000},
        parameters={"x": "x" * 9000},
        inputs={f"input_{i}": long_record().inputs["policy"] for i in range(100)},
    )
    assert {"section", "parameters", "inputs"} <= {*in_metadata(everything)["left_out"]}
    for record in (long_record(), everything):
        assert len(json.dumps(in_metadata(record))) <= IN_METADATA


def test_metadata_is_what_ml_metadata_takes() -> None:
    """Kubeflow's launcher turns each value of the Struct into an ML Metadata value; it knows none for null."""
    shown = json_format.ParseDict({"lineage": in_metadata(long_record())}, struct_pb2.Struct())
    assert shown.fields["lineage"].WhichOneof("kind") == "struct_value"
    assert json_format.MessageToDict(shown)["lineage"]["iteration"] == 3


def long_recipe() -> Recipe:
    """The largest recipe there is, with settings as long as they get."""
    families = {f"reasoning_gym_family_{i}": {"min_terms": 2, "max_terms": 12, "weight": 1} for i in range(105)}
    changed = {"source": "reasoning_gym", "families": families, "template": "x" * 2000, "ground_truths": "text"}
    recipe = load_recipe("qwen2.5_32b_aime", ["iterations=2", "evaluation.every=2"])
    problems = recipe.problems.model_copy(update={**changed, "path": "", "heldout_path": ""})
    return recipe.model_copy(update={"problems": problems})


def test_no_tasks_argument_is_too_long() -> None:
    """What kfp's executor gets as one argument: parameters, and every input with its URI and metadata."""
    import yaml

    ir = next(yaml.safe_load_all(compile_pipeline(long_recipe(), share=True)))
    place = f"s3://a-bucket-with-a-long-name/team/project/artifacts/vapo-qwen2-5-32b-aime/{RUN}/ppo-update-2/{SALT}"
    described = {
        "sha256": "0" * 64,
        "record": "0" * 64,
        "bytes": 1e15,
        "stage": "value_pretraining",
        "iteration": 1e6,
        "display_name": "x" * 40,
    }
    found = {}
    for component in ir["components"].values():
        if "executorLabel" not in component:
            continue
        stage = _stage(ir, component)
        arguments = {"recipe": long_recipe().model_dump_json(), "section": long_recipe().problems.model_dump_json()}
        named = component.get("inputDefinitions", {})
        inputs = {}
        for name in named.get("artifacts", {}):
            whole = 0 if stage == "history" and name != "previous" else IN_METADATA  # metrics do not bear the record
            metadata = {
                **described,
                "lineage": "x" * whole,
                **({} if whole else {"m" * 20 + str(i): 0.1 for i in range(40)}),
            }
            inputs[name] = {"artifacts": [{"name": "0" * 40, "uri": f"{place}/{name}", "metadata": metadata}]}
        outputs = {
            name: {"artifacts": [{"uri": f"{place}/{name}"}]} for name in component["outputDefinitions"]["artifacts"]
        }
        parameters = {name: arguments.get(name, "x" * 100) for name in named.get("parameters", {})}
        text = json.dumps(
            {"inputs": {"parameterValues": parameters, "artifacts": inputs}, "outputs": outputs}, indent=1
        )
        found[stage] = len(text.encode())
    assert {"history", "ppo_update", "report", "rollout"} <= found.keys() <= STAGES.keys()
    assert max(found.values()) < 0.9 * ARGUMENT, found


def _stage(ir: dict[str, Any], component: dict[str, Any]) -> str:
    arguments = ir["deploymentSpec"]["executors"][component["executorLabel"]]["container"]["args"]
    return arguments[arguments.index("--function_to_execute") + 1]


@pytest.mark.parametrize(
    ("outputs", "name"), [(["a", "metrics"], "a"), (["metrics", "a", "b"], "b"), (["page"], "page")]
)
def test_metrics_do_not_bear_the_record(outputs: list[str], name: str) -> None:
    assert bearer(outputs) == name
