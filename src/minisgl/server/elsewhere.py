"""Fields that vLLM and SGLang have and this server has not: refused by name, unless they ask for nothing.

Clients of those send many of them at their defaults. The names are from the two projects' documentation of their APIs.
"""

from __future__ import annotations

from typing import Annotated, Any

from minisgl.server.body import Body, Neutral, NotFalse, Nothing, NotTrue


class AnyElsewhere(Body):
    """What SGLang's /generate shares with its chats and completions."""

    return_hidden_states: NotTrue = None
    lora_path: Nothing = None
    session_params: Nothing = None
    rid: Nothing = None


class Elsewhere(AnyElsewhere):
    """What their chats and completions share."""

    use_beam_search: NotTrue = None
    length_penalty: Annotated[Any, Neutral(1)] = None
    include_stop_str_in_output: NotTrue = None
    spaces_between_special_tokens: NotFalse = None
    no_stop_trim: NotTrue = None
    truncate_prompt_tokens: Nothing = None
    allowed_token_ids: Nothing = None
    bad_words: Annotated[Any, Neutral([])] = None
    prompt_logprobs: Nothing = None
    return_token_ids: NotTrue = None
    logits_processors: Nothing = None
    guided_decoding_backend: Nothing = None
    guided_whitespace_pattern: Nothing = None
    regex: Nothing = None
    ebnf: Nothing = None
    json_schema: Nothing = None
    stop_regex: Nothing = None
    request_id: Nothing = None
    cache_salt: Nothing = None
    kv_transfer_params: Nothing = None
    vllm_xargs: Nothing = None


class ChatElsewhere(Elsewhere):
    """What their chats have beside that."""

    echo: NotTrue = None
    best_of: Annotated[Any, Neutral(1)] = None
    add_special_tokens: NotTrue = None
    chat_template: Nothing = None
    documents: Annotated[Any, Neutral([])] = None
    mm_processor_kwargs: Nothing = None
    include_reasoning: NotFalse = None
    stream_reasoning: NotFalse = None


class CompletionElsewhere(Elsewhere):
    """What their completions have beside that."""

    add_special_tokens: NotFalse = None
    prompt_embeds: Nothing = None


class GenerateElsewhere(AnyElsewhere):
    """What SGLang's /generate has beside its `sampling_params`."""

    image_data: Nothing = None
    audio_data: Nothing = None
    video_data: Nothing = None
    input_embeds: Nothing = None
    token_ids_logprob: Nothing = None
    return_routed_experts: NotTrue = None
    custom_logit_processor: Nothing = None
