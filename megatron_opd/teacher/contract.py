"""Whether SGLang servers serve the model that teacher.path describes, and can take the run's longest sequence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_opd.errors import Outage, UserError
from megatron_opd.models.architecture import ServedModel
from megatron_opd.rollout.replicas import BadReply

Ask = Callable[[str, dict[str, Any] | None], dict[str, Any]]  # (path, body) -> answer or trouble of each URL


def check_contract(ask: Ask, model: ServedModel, longest: int) -> None:
    """Ask every server what it is, and have it score one token.

    `model` is what teacher.path says, `longest` the tokens of the longest sequence. A server that does not answer is
    passed over, unless none does. Raises UserError for one that serves another model or refuses.
    """
    models, settings = ask("/model_info", None), ask("/server_info", None)
    if all(isinstance(answer, BadReply | UserError) for answer in models.values()):
        url, trouble = next(iter(models.items()))
        refused = all(isinstance(answer, UserError) for answer in models.values())
        raise (UserError if refused else Outage)(
            f"teacher.sglang: no server says what it serves; {url}: {trouble}"
        )
    for url, info in models.items():
        if isinstance(info, dict):
            _check_model(url, info, model)
    for url, info in settings.items():
        if isinstance(info, dict):
            _check_length(url, info, longest)
    body = {
        "input_ids": [0, 0],
        "return_logprob": True,
        "logprob_start_len": 0,
        "token_ids_logprob": [model.vocab_size - 1],  # refused where the server's vocabulary is smaller
        "sampling_params": {"max_new_tokens": 0},
    }
    for answer in ask("/generate", body).values():
        if isinstance(answer, UserError):
            raise answer


def _check_model(url: str, info: dict[str, Any], model: ServedModel) -> None:
    if info.get("is_generation") is False:
        raise UserError(f"teacher.sglang: {url} serves a model that does not generate: it has no log-probs")
    names = info.get("architectures")
    if isinstance(names, list) and names and model.architectures and set(names) != set(model.architectures):
        raise UserError(
            f"teacher.sglang: {url} serves {', '.join(map(str, names))}, but teacher.path says "
            f"{', '.join(model.architectures)}: name the folder of the served model's config.json and tokenizer there"
        )
    size = _vocab_size(info.get("model_path"))
    if size is not None and size != model.vocab_size:
        raise UserError(
            f"teacher.sglang: {url} serves {info['model_path']} with {size} tokens, but teacher.path has "
            f"{model.vocab_size}: name that folder there"
        )


def _vocab_size(folder: Any) -> int | None:
    """Of a model that this machine sees too."""
    try:
        found = json.loads((Path(str(folder)) / "config.json").read_text()).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) else None


def _check_length(url: str, info: dict[str, Any], longest: int) -> None:
    # SGLang takes inputs that are shorter than this.
    limit = info.get("max_req_input_len")
    if isinstance(limit, int) and limit <= longest:
        raise UserError(
            f"teacher.sglang: {url} takes {limit - 1} tokens, but a prompt with its response has up to {longest}: "
            "start it with a larger --context-length, or lower rollout.max_new_tokens"
        )
