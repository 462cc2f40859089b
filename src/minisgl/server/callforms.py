"""How models write tool calls, and how a chat template shows which way is a model's own."""

from __future__ import annotations

import dataclasses
import secrets
import string
import uuid


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallForm:
    """A way of writing calls; each is a JSON object with `name`, and its `arguments` or `parameters`.

    `opening` and `closing` surround a call, or with `listed` a JSON list of calls. With `at_start` the answer itself is
    the call, `opening` may be missing, and text after it is no call. `short_ids`: nine letters or digits each.
    """

    opening: str = ""
    closing: str = ""
    listed: bool = False
    at_start: bool = False
    short_ids: bool = False

    def new_id(self) -> str:
        """The id of a call."""
        if self.short_ids:
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{uuid.uuid4().hex[:24]}"


HERMES = CallForm(opening="<tool_call>", closing="</tool_call>")
"""Qwen 2.5 and 3, Hermes: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of times."""
MISTRAL = CallForm(opening="[TOOL_CALLS]", listed=True, short_ids=True)
"""Mistral: `[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]`; its templates refuse ids of another length."""
LLAMA = CallForm(opening="<|python_tag|>", at_start=True)
"""Llama 3.1 to 3.3: the answer is `{"name": …, "parameters": {…}}`, several of them separated by `;`."""


def forced(form: CallForm) -> CallForm:
    """What a forced answer is, whatever the model's own way: a JSON list of calls."""
    return CallForm(listed=True, at_start=True, short_ids=form.short_ids)


def recognise(template: str, takes_tools: bool) -> CallForm | None:
    """The way of a chat template; None for one that takes no tools or writes them as no form here does."""
    if not takes_tools or "<function=" in template or "[ARGS]" in template:
        return None
    if HERMES.opening in template:
        return HERMES
    if MISTRAL.opening in template:
        return MISTRAL
    if LLAMA.opening in template or '"parameters"' in template:
        return LLAMA
    return None
