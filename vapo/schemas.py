"""The Arrow tables that stages pass on; every column says who writes it and who reads it.

Rows of ROLLOUTS, REWARDS and EXPERIENCE of one iteration join by position, and `rollout_id` proves it. Ragged
columns are Arrow lists: never padded. Axes: B rows, T tokens of a row, N all tokens of a table.
"""

from __future__ import annotations

import pyarrow as pa

NAME = b"vapo.table"
VERSION = b"vapo.table_version"
FORMAT = b"2"


def _table(name: str, *columns: tuple[str, pa.DataType]) -> pa.Schema:
    fields = [pa.field(column, kind, nullable=False) for column, kind in columns]
    return pa.schema(fields, metadata={NAME: name.encode(), VERSION: FORMAT})


TOKENS = pa.list_(pa.field("item", pa.int32(), nullable=False))
FLOATS = pa.list_(pa.field("item", pa.float32(), nullable=False))

PROMPTS = _table(
    "PROMPTS",
    ("prompt_id", pa.string()),  # problems -> everybody
    ("prompt", pa.string()),  # problems -> rollout; holds nothing of the answer
    ("ground_truth", pa.string()),  # problems -> verification
    ("family", pa.string()),  # problems -> evaluation
    ("difficulty", pa.int32()),  # problems -> report; steps of a chain, 0 when unknown
)
EXAMPLES = _table(
    "EXAMPLES",
    ("prompt", pa.string()),  # problems -> base_model
    ("response", pa.string()),  # problems -> base_model
    ("difficulty", pa.int32()),  # problems -> base_model's curriculum
)
ROLLOUTS = _table(
    "ROLLOUTS",
    ("rollout_id", pa.string()),  # rollout -> everybody: "iteration/prompt_id/sample_index"
    ("prompt_id", pa.string()),  # rollout -> verification, evaluation
    ("sample_index", pa.int32()),  # rollout -> report
    ("seed", pa.uint64()),  # rollout -> a person who wants that one response again
    ("prompt_tokens", TOKENS),  # rollout -> train
    ("response_tokens", TOKENS),  # rollout -> train; ends with the stop token when finish_reason is "stop"
    ("rollout_logprobs", FLOATS),  # rollout -> ppo_update's mismatch metric; at temperature 1, one per response token
    ("response", pa.string()),  # rollout -> verification; the text without the stop token
    ("finish_reason", pa.string()),  # rollout -> verification, metrics: "stop" or "length"
)
REWARDS = _table(
    "REWARDS",
    ("rollout_id", pa.string()),  # verification -> everybody
    ("correct", pa.bool_()),  # verification -> ppo_update's positive examples, evaluation; before any shaping
    ("reward", pa.float32()),  # verification -> value_pretraining, advantages
    ("extracted", pa.string()),  # verification -> evaluation's majority, report; "" when there is no answer
    ("verdict", pa.string()),  # verification -> report, metrics; one of vapo.problems.grading.WHYS
)
EXPERIENCE = _table(
    "EXPERIENCE",
    ("rollout_id", pa.string()),  # advantages -> ppo_update
    ("trained", pa.bool_()),  # advantages -> ppo_update; False: left out by dynamic sampling
    ("lambda_policy", pa.float32()),  # advantages -> report; 1 where advantages are group-normalised
    ("values", FLOATS),  # advantages -> ppo_update's value clip, report; V before each token, or the group's mean
    ("advantages", FLOATS),  # advantages -> ppo_update; from lambda_policy, or group-normalised
    ("value_targets", FLOATS),  # advantages -> ppo_update; from lambda_critic
)
PRETRAINING = _table(
    "PRETRAINING",
    ("step", pa.int32()),  # value_pretraining -> report; optimiser steps done when it was measured
    ("rows", pa.string()),  # value_pretraining -> report; "mini-batch" (before its step) or "held-out"
    ("value_loss", pa.float32()),  # value_pretraining -> report; 0.5 MSE per token
    ("explained_variance", pa.float32()),  # value_pretraining -> report; NaN: undefined, all rewards are equal
)
EVALUATION = _table(
    "EVALUATION",
    ("prompt_id", pa.string()),  # evaluation -> report
    ("family", pa.string()),  # evaluation -> report
    ("difficulty", pa.int32()),  # evaluation -> report
    ("samples", pa.int32()),  # evaluation -> report; k
    ("correct", pa.int32()),  # evaluation -> report; of k
    ("truncated", pa.int32()),  # evaluation -> a person; of k
    ("majority", pa.string()),  # evaluation -> report; the answer most samples have; "" without one, and in a tie
    ("mean_length", pa.float32()),  # evaluation -> report; tokens
)
HISTORY = _table(
    "HISTORY",
    ("iteration", pa.int32()),  # history -> report; 0 is before the first update
    ("stage", pa.string()),  # history -> report
    ("name", pa.string()),  # history -> report; `seconds` is a measured time, so it differs between reruns
    ("value", pa.float64()),  # history -> report
)
TABLES = {
    schema.metadata[NAME].decode(): schema
    for schema in (PROMPTS, EXAMPLES, ROLLOUTS, REWARDS, EXPERIENCE, PRETRAINING, EVALUATION, HISTORY)
}


def name_of(schema: pa.Schema) -> str:
    """The name that a schema carries, or "" for a foreign one."""
    return (schema.metadata or {}).get(NAME, b"").decode()
