"""Requests that must be refused: name, path, body, and the status, code and field of the error."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from helpers.serving import MODEL
from minisgl.server.protocol import MAX_MESSAGES

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
GENERATE = "/generate"
TOKENIZE = "/tokenize"
DETOKENIZE = "/detokenize"
USER = [{"role": "user", "content": "hi"}]
GOOD: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
VALUE, UNSUPPORTED, UNKNOWN = "invalid_value", "unsupported_parameter", "unknown_parameter"
MISSING, TOO_LONG = "missing_required_parameter", "context_length_exceeded"
STATUS = {
    "model_not_found": 404, "unsupported_endpoint": 404, "method_not_allowed": 405,
    "request_too_large": 413,
}  # fmt: skip
SAID = {"role": "user", "content": "x"}
CONTINUED = {"continue_final_message": True}


class Bad(NamedTuple):
    """A row; `body` is what is sent."""

    name: str
    path: str
    body: str | bytes
    code: str
    param: str | None


def chat(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


def text(prompt: Any = "x", **changes: Any) -> str:
    return json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": 2, **changes})


NUMBERS: tuple[Any, ...] = ("high", True, [1], {})
WRONG: dict[str, tuple[Any, ...]] = {
    "temperature": (*NUMBERS, -0.1, 101), "top_p": (*NUMBERS, 0, -1, 1.1), "min_p": (*NUMBERS, -0.1, 2),
    "top_k": ("7", True, 1.5, -2, 2**31, []),
    "seed": ("7", True, 0.5, 2**64, -(2**63) - 1, []),
    "stop": ("", [""], [1], 3, ["x"] * 17, {}, "x" * 1025),
    "stop_token_ids": ([10**6], [-1], ["1"], [True], "1", 5, list(range(40)), [10**40], [5.0]),
    "max_tokens": (0, -1, "5", 1.5, True, []),
    "min_tokens": (-1, 3, "1", 0.5, True), "ignore_eos": ("yes", 1, []), "skip_special_tokens": ("no", 0, {}),
    "presence_penalty": (*NUMBERS, 2.1, -2.1), "frequency_penalty": (*NUMBERS, 2.1, -2.1),
    "repetition_penalty": (*NUMBERS, 0, -1, 101),
    "logit_bias": (
        {"x": 1}, {"-1": 1}, {"1.5": 1}, {"": 1}, {"5": 101}, {"5": -101}, {"5": "1"}, {"5": True},
        {"999999": 1}, {"9999999999": 1}, [5], "5", {str(i): 1 for i in range(1025)}, {"5": None},
    ),
    "n": (0, -1, True, "2", 1.5, 129, 9, []),
    "stream": ("yes", 1, [], {}), "priority": (1.5, "1", True, 2**31, -(2**31) - 1),
    "return_tokens_as_token_ids": ("yes", 1),
    "user": (5, {}, []), "metadata": ("x", {"a": 1}, [], {"a": {}}), "store": ("yes", 1),
    "prompt_logprobs": (-1, 21, "1", True, 1.5),
    "allowed_token_ids": ([], [-1], ["1"], [10**6], [10**40], [5] * 500, "x", 5),
    "bad_words": ("x", [""], [" "], [1], ["x" * 1025], ["x"] * 1025, {}), "include_stop_str_in_output": ("yes", 1),
    "truncate_prompt_tokens": (0, -2, 1.5, "8", 2**31, True), "return_token_ids": ("yes", 1), "no_stop_trim": ("no",),
    "regex": (5, []), "ebnf": (5, " "), "json_schema": (5, []),
    "response_format": ("json", [], 5), "guided_regex": (5, []), "guided_choice": ("x", [1], []), "model": (5, [], {}),
}  # fmt: skip
"""Fields of chats and completions, with values that each refuses."""

ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    CHAT: {
        "logprobs": (1, "yes", 0),
        "top_logprobs": (3, 21, -1, "2", True),
        "max_completion_tokens": ("5", 1.5, True),
        "tool_choice": ("required", "always", 5, {"type": "function", "function": {"name": "f"}}),
        "parallel_tool_calls": ("yes", 1), "separate_reasoning": ("yes", 1), "add_generation_prompt": ("yes", 1),
        "continue_final_message": ("yes", True, 1),
        "chat_template_kwargs": (
            "x", [], {"messages": []}, {"add_generation_prompt": True}, {"tools": []}, {"bos_token": "x"},
        ),
        "messages": ([], "hi", None, {}, 5),
    },
    TEXT: {
        "logprobs": (True, -1, 21, "1", 1.5),
        "echo": ("yes", 1),
        "best_of": (0, 129, "2", True, 1.5),
        "prompt": (
            "", [], ["x", ""], None, ["x", 1], [True], [[5], [-1]], [10**6], [10**40], [[]], [["x"]], 5, {"a": 1},
            [None], [5.0], [[5.0]],
        ),
    },
}  # fmt: skip

REFUSED: dict[str, dict[str, tuple[Any, ...]]] = {
    CHAT: {
        "functions": ([{"name": "f"}],), "function_call": ({"name": "f"},), "modalities": (["text", "audio"],),
        "audio": ({"voice": "a"},), "prediction": ({"type": "content"},), "verbosity": ("low",),
        "web_search_options": ({},), "service_tier": ("flex", "priority"), "tools": ([TOOL],),
        "reasoning_effort": ("high",), "use_beam_search": (True,), "echo": (True,), "best_of": (2,), "regex": ("a",),
        "rid": ("x",), "chat_template": ("x",), "documents": ([{}],),
        "add_special_tokens": (True,), "request_id": ("x",), "lora_path": ("x",), "include_reasoning": (False,),
    },
    TEXT: {
        "suffix": ("x",), "service_tier": ("flex",), "use_beam_search": (True, 0), "length_penalty": (2,),
        "add_special_tokens": (False,), "ebnf": ("root ::= x",), "json_schema": ({},), "prompt_embeds": ("x",),
    },
}  # fmt: skip
"""Fields that are known and asked for something that is not supported."""

NATIVE: dict[str, tuple[Any, ...]] = {
    **{name: WRONG[name] for name in ("temperature", "top_p", "min_p", "stop", "stop_token_ids", "logit_bias")},
    "max_new_tokens": WRONG["max_tokens"], "min_new_tokens": (-1, 200, "5"), "sampling_seed": WRONG["seed"],
    "top_k": WRONG["top_k"], "n": (0, 129, "2"), "regex": (5,),
}  # fmt: skip


def messages(*several: Any) -> str:
    return chat(messages=list(several))


def answer(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, **fields}


def call(**changes: Any) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}, **changes}


def called(arguments: Any) -> str:
    return messages(answer(tool_calls=[call(function={"name": "f", "arguments": arguments})]))


def native(params: Any) -> str:
    return json.dumps({"text": "x", "sampling_params": params})


def generated() -> Iterator[Bad]:
    """Every wrong value of every field."""
    for path, body in ((CHAT, chat), (TEXT, text)):
        for field, values in (WRONG | ONLY[path]).items():
            for value in values:
                name = f"{path} {field}={str(value)[:30]}"
                yield Bad(name, path, body(**{field: value}), VALUE, field)
        for field, values in REFUSED[path].items():
            for value in values:
                yield Bad(f"{path} {field}={value}", path, body(**{field: value}), UNSUPPORTED, field)
    for field, values in NATIVE.items():
        for value in values:
            name = f"{GENERATE} {field}={value}"
            yield Bad(name, GENERATE, native({field: value}), VALUE, f"sampling_params.{field}")
    for path in (CHAT, TEXT, GENERATE, TOKENIZE, DETOKENIZE):
        broken: tuple[tuple[str, str | bytes], ...] = (
            ("cut JSON", '{"messages": ['), ("no body", ""), ("a list", "[1]"), ("a string", '"x"'), ("null", "null"),
            ("a number", "5"), ("two objects", "{}{}"), ("not UTF-8", b'{"model": "\xff"}'), ("NUL", b"\x00"),
            ("too deep", '{"messages": ' + "[" * 100_000), ("lone surrogate", '{"prompt": "a\\ud800b"}'),
            ("not JSON", "model=x"), ("a comment", '{"model": "x" /* y */}'), ("NaN", '{"temperature": NaN}'),
            ("too large a number", '{"temperature": 1e999}'),
        )  # fmt: skip
        for name, content in broken:
            yield Bad(f"{path} {name}", path, content, "invalid_json", None)
        yield Bad(f"{path} body too large", path, b" " * (2**24 + 1), "request_too_large", None)


SINGLE: dict[str, tuple[str, str | bytes, str, str | None]] = {
    "no messages": (CHAT, "{}", MISSING, "messages"),
    "no prompt": (TEXT, "{}", MISSING, "prompt"),
    "message a string": (CHAT, messages("hi"), VALUE, "messages.0"),
    "user without content": (CHAT, messages({"role": "user"}), VALUE, "messages.0.content"),
    "message without role": (CHAT, messages({"content": "x"}), MISSING, "messages.0.role"),
    "content a number": (CHAT, messages({"role": "user", "content": 3}), VALUE, "messages.0.content"),
    "part without text": (CHAT, messages({"role": "user", "content": [{"type": "text"}]}),
        MISSING, "messages.0.content.0.text"),
    "too many messages": (CHAT, messages(*[SAID] * (MAX_MESSAGES + 1)), VALUE, "messages"),
    "unknown role": (CHAT, messages({"role": "wizard", "content": "x"}), VALUE, "messages.0.role"),
    "function role": (CHAT, messages({"role": "function", "name": "f", "content": "x"}),
        UNSUPPORTED, "messages.0.role"),
    "tool without id": (CHAT, messages({"role": "tool", "content": "x"}), VALUE, "messages.0.tool_call_id"),
    "tool without content": (CHAT, messages({"role": "tool", "tool_call_id": "1"}), VALUE, "messages.0.content"),
    "id of a user": (CHAT, messages({**SAID, "tool_call_id": "1"}), VALUE, "messages.0.tool_call_id"),
    "calls of a user": (CHAT, messages({**SAID, "tool_calls": [call()]}), VALUE, "messages.0.tool_calls"),
    "call without function": (CHAT, messages(answer(tool_calls=[{"id": "c", "type": "function"}])),
        MISSING, "messages.0.tool_calls.0.function"),
    "arguments an object": (CHAT, called({}), VALUE, "messages.0.tool_calls.0.function.arguments"),
    "old function call": (CHAT, messages(answer(function_call={"name": "f", "arguments": "{}"})),
        UNSUPPORTED, "messages.0.function_call"),
    "refusal sent back": (CHAT, messages(answer(refusal="no")), UNSUPPORTED, "messages.0.refusal"),
    "image": (CHAT, messages({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
        UNSUPPORTED, "messages.0.content"),
    "audio part": (CHAT, messages({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}),
        UNSUPPORTED, "messages.0.content"),
    "unknown field": (CHAT, chat(colour="red"), UNKNOWN, "colour"),
    "unknown field of a completion": (TEXT, text(colour="red"), UNKNOWN, "colour"),
    "messages in a completion": (TEXT, text(messages=USER), UNKNOWN, "messages"),
    "prompt in a chat": (CHAT, chat(prompt="x"), UNKNOWN, "prompt"),
    "unknown field of a tool": (CHAT, chat(tools=[{**TOOL, "mood": 1}]), UNKNOWN, "tools.0.mood"),
    "unknown field of a format": (CHAT, chat(response_format={"type": "text", "mood": 1}),
        UNKNOWN, "response_format.mood"),
    "prompt log-probabilities streamed": (CHAT, chat(stream=True, prompt_logprobs=1), VALUE, "prompt_logprobs"),
    "odd unknown field": (CHAT, chat(**{"what is": 1}), UNKNOWN, "what is"),
    "unknown model": (CHAT, chat(model="gpt-9"), "model_not_found", "model"),
    "unknown model of a completion": (TEXT, text(model="gpt-9"), "model_not_found", "model"),
    "unknown model of tokenize": (TOKENIZE, '{"prompt": "x", "model": "y"}', "model_not_found", "model"),
    "prompt too long": (TEXT, text("a b " * 400), TOO_LONG, "prompt"),
    "chat too long": (CHAT, messages({"role": "user", "content": "a b " * 400}), TOO_LONG, "messages"),
    "text to generate too long": (GENERATE, json.dumps({"text": "a b " * 400}), TOO_LONG, "text"),
    "prompt and max_tokens too long": (TEXT, text(max_tokens=128), TOO_LONG, "max_tokens"),
    "max_tokens huge": (CHAT, chat(max_tokens=10**30), TOO_LONG, "max_tokens"),
    "two limits": (CHAT, chat(max_completion_tokens=3), VALUE, "max_tokens"),
    "no tokens": (CHAT, chat(max_tokens=None, max_completion_tokens=0), VALUE, "max_completion_tokens"),
    "too many tokens": (CHAT, chat(max_tokens=None, max_completion_tokens=128), TOO_LONG, "max_completion_tokens"),
    "many unknown fields": (CHAT, json.dumps({f"x{i}": 1 for i in range(2000)}), UNKNOWN, "x0"),
    "many bad ids": (CHAT, chat(stop_token_ids=["x"] * 2000), VALUE, "stop_token_ids"),
    "stream_options alone": (CHAT, chat(stream_options={"include_usage": True}), VALUE, "stream_options"),
    "unknown stream option": (CHAT, chat(stream=True, stream_options={"colour": 1}), UNKNOWN, "stream_options.colour"),
    "stream option a string": (CHAT, chat(stream=True, stream_options={"include_usage": "x"}),
        VALUE, "stream_options.include_usage"),
    "best_of below n": (TEXT, text(n=3, best_of=2), VALUE, "best_of"),
    "best_of streamed": (TEXT, text(best_of=2, stream=True), VALUE, "best_of"),
    "tokens with many answers": (TEXT, text([[5]] * 8, bad_words=[f"{i}{'x' * 1000}" for i in range(300)]),
        VALUE, "allowed_token_ids"),
    "too many prompts": (TEXT, text(["x"] * 9), VALUE, "prompt"),
    "too many answers": (TEXT, text(["x", "y"], n=5), VALUE, "n"),
    "json mode": (CHAT, chat(response_format={"type": "json_object"}), UNSUPPORTED, "response_format"),
    "choice without function": (CHAT, chat(tool_choice={"type": "function"}), MISSING, "tool_choice.function"),
    "unknown form": (CHAT, chat(structured_outputs={"poem": 1}), UNKNOWN, "structured_outputs.poem"),
    "tool a string": (CHAT, chat(tools=["f"]), VALUE, "tools.0"),
    "tool of another type": (CHAT, chat(tools=[{"type": "custom"}]), VALUE, "tools.0.type"),
    "tool without function": (CHAT, chat(tools=[{"type": "function"}]), MISSING, "tools.0.function"),
    "tool without name": (CHAT, chat(tools=[{"type": "function", "function": {}}]), MISSING, "tools.0.function.name"),
    "tool with a bad name": (CHAT, chat(tools=[{"type": "function", "function": {"name": "a b"}}]),
        VALUE, "tools.0.function.name"),
    "two tools of one name": (CHAT, chat(tools=[TOOL, TOOL]), VALUE, "tools"),
    "too many tools": (CHAT, chat(tools=[TOOL] * 129), VALUE, "tools"),
    "tool that is not there": (CHAT, chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
        VALUE, "tool_choice"),
    "tools and a form": (CHAT, chat(tools=[TOOL], guided_regex="a"), UNSUPPORTED, "tools"),
    "continue and begin": (CHAT, chat(messages=[*USER, answer(content="x")], **CONTINUED, add_generation_prompt=True),
        VALUE, "continue_final_message"),
    "continue a call": (CHAT, chat(messages=[*USER, answer(content="x", tool_calls=[call()])], **CONTINUED),
        VALUE, "continue_final_message"),
    "a form beside plain text": (CHAT, chat(response_format={"type": "text"}, guided_regex="a"),
        UNSUPPORTED, "guided_regex"),
    "generate nothing": (GENERATE, "{}", VALUE, "text"),
    "generate both": (GENERATE, '{"text": "x", "input_ids": [5]}', VALUE, "text"),
    "generate empty": (GENERATE, '{"text": ""}', VALUE, "text"),
    "generate no ids": (GENERATE, '{"input_ids": []}', VALUE, "input_ids"),
    "generate bad ids": (GENERATE, '{"input_ids": [-1]}', VALUE, "input_ids"),
    "generate from fractions": (GENERATE, '{"input_ids": [5.0]}', VALUE, "input_ids"),
    "generate an image": (GENERATE, '{"text": "x", "image_data": "y"}', UNSUPPORTED, "image_data"),
    "generate a tag": (GENERATE, native({"structural_tag": "x"}), UNSUPPORTED, "sampling_params.structural_tag"),
    "generate two forms": (GENERATE, native({"regex": "x", "ebnf": "x"}), VALUE, "sampling_params.ebnf"),
    "generate an unknown parameter": (GENERATE, native({"heat": 1}), UNKNOWN, "sampling_params.heat"),
    "generate a list of parameters": (GENERATE, '{"text": "x", "sampling_params": []}', VALUE, "sampling_params"),
    "generate parameters for too few": (GENERATE, '{"text": ["x", "y"], "sampling_params": [{}]}',
        VALUE, "sampling_params"),
    "generate ids for too many": (GENERATE, '{"text": ["x"], "rid": ["a", "b"]}', VALUE, "rid"),
    "generate an empty id": (GENERATE, '{"text": "x", "rid": ""}', VALUE, "rid"),
    "generate a long id": (GENERATE, json.dumps({"text": "x", "rid": "x" * 257}), VALUE, "rid"),
    "generate different n": (GENERATE, '{"text": ["x", "y"], "sampling_params": [{"n": 1}, {"n": 2}]}',
        VALUE, "sampling_params"),
    "generate some and none": (GENERATE, '{"text": ["x", "y"], "return_logprob": true, "sampling_params": '
        '[{"max_new_tokens": 0}, {"max_new_tokens": 2}]}', VALUE, "sampling_params.max_new_tokens"),
    "generate too hot in a list": (GENERATE, '{"text": ["x", "y"], "sampling_params": [{}, {"temperature": 101}]}',
        VALUE, "sampling_params.1.temperature"),
    "generate a tag in a list": (GENERATE, '{"text": ["x"], "sampling_params": [{"structural_tag": "x"}]}',
        UNSUPPORTED, "sampling_params.0.structural_tag"),
    "generate lists for one": (GENERATE, '{"text": "x", "return_logprob": [true]}', VALUE, "return_logprob"),
    "start without logprob": (GENERATE, '{"text": "x", "logprob_start_len": 0}', VALUE, "logprob_start_len"),
    "start below": (GENERATE, '{"text": "x", "return_logprob": true, "logprob_start_len": -2}',
        VALUE, "logprob_start_len"),
    "top without logprob": (GENERATE, '{"text": "x", "top_logprobs_num": 2}', VALUE, "top_logprobs_num"),
    "tokenize nothing": (TOKENIZE, "{}", MISSING, "prompt"),
    "tokenize ids": (TOKENIZE, '{"prompt": [1]}', VALUE, "prompt"),
    "tokenize no messages": (TOKENIZE, '{"messages": []}', VALUE, "messages"),
    "tokenize too much": (TOKENIZE, '{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}',
        UNKNOWN, "prompt"),
    "detokenize nothing": (DETOKENIZE, "{}", MISSING, "tokens"),
    "detokenize text": (DETOKENIZE, '{"tokens": "x"}', VALUE, "tokens"),
    "detokenize fractions": (DETOKENIZE, '{"tokens": [5.0]}', VALUE, "tokens"),
    "detokenize too high": (DETOKENIZE, '{"tokens": [1000000]}', VALUE, "tokens"),
    "detokenize beyond 64 bits": (DETOKENIZE, '{"tokens": [1' + "0" * 40 + "]}", VALUE, "tokens"),
    "no such path": ("/v1/nothing", "{}", "unsupported_endpoint", None),
    "embeddings": ("/v1/embeddings", "{}", "unsupported_endpoint", None),
    "wrong method": ("/v1/models", "{}", "method_not_allowed", None),
}  # fmt: skip

BAD = [*generated(), *(Bad(name, *row) for name, row in SINGLE.items())]
