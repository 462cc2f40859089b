"""SGLang's /generate: its request body. Several prompts share its fields, or have a list with an entry for each."""

from typing import Annotated, Any, ClassVar

from msgspec import Meta

from minisgl.core.types import Grammar, SamplingParams
from minisgl.server import protocol
from minisgl.server.protocol import Body, Count, Logprobs, Sampling, Unsupported, require

GENERATE_MAX_TOKENS = 128  # the default of max_new_tokens
PER_PROMPT = ("sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "rid")

StartLen = Annotated[int, Meta(ge=-1)]
RequestId = Annotated[str, Meta(min_length=1, max_length=256)]


class SglangSampling(
    Sampling, rename={"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"}
):
    unsupported: ClassVar[Unsupported] = {
        "structural_tag": (), "spaces_between_special_tokens": (True,), "stop_regex": (), "stream_interval": (),
        "custom_params": (),
    }  # fmt: skip

    max_tokens: Count | None = None
    min_tokens: Count | None = None
    seed: protocol.Seed | None = None


class GenerateRequest(Body):
    """`logprob_start_len` -1 gives no prompt log-probabilities, else those from there on. A `max_new_tokens` of 0 asks
    for them alone. `rid` is the id that a response has and that /abort_request takes.
    """

    unsupported: ClassVar[Unsupported] = {
        **protocol.ANY_UNSUPPORTED, "image_data": (), "audio_data": (), "video_data": (), "input_embeds": (),
        "token_ids_logprob": (), "return_routed_experts": (False,), "custom_logit_processor": (),
    }  # fmt: skip

    text: Annotated[Any, Meta(extra_json_schema={"anyOf": [*protocol.TEXTS, {"type": "null"}]})] = None
    input_ids: Annotated[Any, Meta(extra_json_schema={"anyOf": [*protocol.IDS, {"type": "null"}]})] = None
    sampling_params: SglangSampling | list[SglangSampling] | None = None
    stream: bool | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: StartLen | list[StartLen] | None = None
    top_logprobs_num: Logprobs | list[Logprobs] | None = None
    return_text_in_logprobs: bool | None = None
    rid: RequestId | list[RequestId] | None = None
    priority: protocol.Priority | None = None

    def check(self) -> None:
        require((self.text is None) != (self.input_ids is None), "give either text or input_ids", "text")
        for name in PER_PROMPT:
            value = getattr(self, name)
            fits = not isinstance(value, list) or (self.is_batch and len(value) == len(self.prompts))
            require(fits, f"{name} must have one entry for each of several prompts", name)
        # Clients that say return_logprob: false send the others at any value.
        nothing = {"logprob_start_len": -1, "top_logprobs_num": 0, "return_text_in_logprobs": False}
        for name, value in nothing.items():
            neutral = self.return_logprob is not None or getattr(self, name) in (None, value)
            require(neutral, f"{name} is only allowed with return_logprob", name)
        same_n = len({each.num_generated for each in self.samplings}) <= 1
        require(same_n, "n must be the same for all prompts", "sampling_params")
        param = "sampling_params.max_new_tokens"
        rule = f"{param} of 0 needs return_logprob, and holds for all prompts"
        some = any(each.max_tokens == 0 for each in self.samplings)
        require(not some or (self.scores_only and self.return_logprob), rule, param)

    @property
    def is_batch(self) -> bool:
        return isinstance(self.prompts, list) and not (self.prompts and isinstance(self.prompts[0], int))

    @property
    def prompts(self) -> Any:
        return self.input_ids if self.text is None else self.text

    @property
    def num_generated(self) -> int:
        return self.samplings[0].num_generated

    @property
    def scores_only(self) -> bool:
        return all(each.max_tokens == 0 for each in self.samplings)

    @property
    def samplings(self) -> list[SglangSampling]:
        given = self.sampling_params or SglangSampling()
        return given if isinstance(given, list) else [given]

    def of_prompt(self, name: str, index: int) -> Any:
        value = getattr(self, name)
        return value[index] if isinstance(value, list) else value

    def sampling(self, index: int) -> SglangSampling:
        return self.of_prompt("sampling_params", index) or SglangSampling()

    def params(self, index: int, grammar: Grammar | None) -> SamplingParams:
        sampling, start = self.sampling(index), self.of_prompt("logprob_start_len", index)
        top = (self.of_prompt("top_logprobs_num", index) or 0) if self.of_prompt("return_logprob", index) else None
        prompt = None if start is None or start < 0 else top
        limit = GENERATE_MAX_TOKENS if sampling.max_tokens is None else max(sampling.max_tokens, 1)
        return sampling.sampling_params(max_tokens=limit, logprobs=top, prompt_logprobs=prompt, grammar=grammar)
