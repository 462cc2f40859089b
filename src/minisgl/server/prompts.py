"""From a conversation to the text of a prompt, and what the chat template lets a conversation say."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from minisgl.core.types import CLOSE_THOUGHT, OPEN_THOUGHT
from minisgl.errors import InvalidRequestError, UnsupportedParameterError
from minisgl.server.callforms import CallForm, recognise
from minisgl.server.messages import Tool, template_messages
from minisgl.server.protocol import ChatRequest, Conversation
from minisgl.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Template:
    """What a model's chat template knows: how it writes tool calls, and whether its answers begin by thinking."""

    call_form: CallForm | None
    thinks: bool
    variables: frozenset[str]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Template:
        """Read the template of a tokenizer; a model without one knows nothing."""
        template = tokenizer.chat_template
        if template is None:
            return cls(None, False, frozenset())
        form = recognise(template.source, "tools" in template.variables)
        return cls(form, CLOSE_THOUGHT in template.source, template.variables)

    def check_tools(self) -> CallForm:
        """The form of its tool calls; raises UnsupportedParameterError when it has none that is known."""
        if "tools" not in self.variables:
            raise UnsupportedParameterError("this model's chat template has no place for tools", param="tools")
        if self.call_form is None:
            raise UnsupportedParameterError("this model's way of writing tool calls is not known here", param="tools")
        return self.call_form


def render(tokenizer: Tokenizer, template: Template, chat: Conversation, tools: list[Tool]) -> str:
    """The text of a conversation; raises InvalidRequestError naming the field at fault."""
    variables: dict[str, Any] = chat.template_variables()
    if tools:
        template.check_tools()
        variables["tools"] = [tool.for_template() for tool in tools]
    if isinstance(chat, ChatRequest) and chat.reasoning_effort is not None:
        if "reasoning_effort" not in template.variables:
            raise UnsupportedParameterError(
                "this model's chat template does not know reasoning_effort", param="reasoning_effort"
            )
        variables.setdefault("reasoning_effort", chat.reasoning_effort)
    messages = template_messages(chat.messages)
    try:
        if chat.continue_final_message:
            return tokenizer.render_continued(messages, **variables)
        add = chat.add_generation_prompt is not False
        return tokenizer.render_chat(messages, add_generation_prompt=add, **variables)
    except InvalidRequestError as error:
        error.param = error.param or "messages"
        raise


def thought_before(prompt: str, chat: ChatRequest) -> Literal["none", "possible", "begun"]:
    """What an answer that has a form may think first: the prompt may have begun it, or have had it."""
    if begins_in_thought(prompt, chat):
        return "begun"
    over = chat.continue_final_message or chat.add_generation_prompt is False or prompt.rstrip().endswith(CLOSE_THOUGHT)
    return "none" if over else "possible"


def begins_in_thought(prompt: str, chat: ChatRequest) -> bool:
    """Whether the prompt has opened the block that the answer thinks in.

    The template does so at its end, or the answer that is continued did.
    """
    if chat.continue_final_message:
        last = chat.messages[-1].text
        return last.rfind(OPEN_THOUGHT) > last.rfind(CLOSE_THOUGHT)
    return chat.add_generation_prompt is not False and prompt.rstrip().endswith(OPEN_THOUGHT)
