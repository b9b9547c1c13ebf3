"""The keys of the rollouts, and of SGLang servers: those that draw them, and a teacher's."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_opd.config.section import Count, LocalPath, PositiveInt, Section


class SGLangConfig(Section):
    """SGLang servers of rollouts or of a teacher: started by the run (`python`), or running already (`urls`)."""

    python: LocalPath | None = Field(
        None,
        description="Interpreter of the environment that has SGLang; the run starts its servers with it.",
    )
    servers: PositiveInt = Field(1, description="Servers that the run starts, on the machine of rank 0.")
    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address that started servers listen at. Beyond this machine they ask for a key, made by the run.",
    )
    gpus: list[Count] = Field(
        [],
        description="GPUs of that machine for started servers, dealt in order, the same number to each, which is its "
        "--tp-size unless `arguments` says otherwise. Training has the first ones. []: SGLang's own choice, GPU 0 "
        "for every server.",
    )
    arguments: list[str] = Field(
        [], description="Further arguments of sglang.launch_server, one word an entry."
    )
    urls: list[Annotated[str, Field(pattern="^https?://[^/]+$")]] = Field(
        [],
        description="Servers that run already, such as http://node1:30000; their key, if any, is the environment "
        "variable SGLANG_API_KEY. Those of rollouts serve the student's architecture (and see run_dir with weight_sync "
        "disk), those of a teacher the model of teacher.path.",
    )
    concurrency: PositiveInt = Field(
        64, description="Requests at a server at once, from each replica of the student."
    )
    request_timeout: float = Field(
        1800.0, gt=0, description="Seconds that one request may take; then another server is asked."
    )
    outage_timeout: float = Field(
        600.0,
        gt=0,
        description="Seconds that servers may take to start, and that the run waits when none works before it stops.",
    )


class RolloutConfig(Section):
    """What the student generates in a step."""

    engine: Literal["local", "sglang"] = Field(
        "local",
        description="local: the training processes themselves. sglang: SGLang servers, as the section `sglang` says.",
    )
    sglang: SGLangConfig = SGLangConfig()
    weight_sync: Literal["disk", "tensor", "distributed"] = Field(
        "disk",
        description="How servers get the weights of a step. disk: through a folder in run_dir. tensor: through HTTP, "
        "on this machine. distributed: through a torch process group. Read by the engine sglang.",
    )
    prompts_per_step: PositiveInt = Field(
        64, description="Prompts in a step, over all data-parallel replicas."
    )
    samples_per_prompt: PositiveInt = Field(1, description="Responses drawn for every prompt.")
    max_new_tokens: PositiveInt = Field(
        2048, description="Tokens of a response at most, its stop token included."
    )
    temperature: float = Field(
        1.0, gt=0, description="Divides the logits of rollout, student and teacher alike."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Nucleus sampling: the likeliest tokens that hold this much probability are kept. 1 is off.",
    )
    top_k: Count = Field(
        0, description="Number of likeliest tokens kept; with `top_p`, what both keep. 0 is off."
    )
    max_staleness: Count = Field(
        0,
        description="Steps that the weights of a rollout may lag behind the student it trains. Above 0 the servers of "
        "the engine sglang draw the rollouts of so many steps ahead, while the student trains.",
    )
    max_batch: PositiveInt | None = Field(
        None,
        description="Responses decoded together in a replica; bounds the key-value cache. null: all of a step. Read "
        "by the engine local.",
    )
    mismatch_threshold: float = Field(
        0.5,
        gt=0,
        description="Nats by which a token's log-prob in the rollout may differ from the student's in training before "
        "it counts in the metric logprob_mismatch_high.",
    )
    mismatch_alarm: float | None = Field(
        0.02,
        ge=0,
        lt=1,
        description="Share of tokens beyond `mismatch_threshold` above which a step prints a warning. The rounding of "
        "bf16 stays far below, wrong weights or a wrong temperature far above. null: no warning.",
    )
