"""Small chat templates with what the large ones have: tools, calls in the history, reasoning."""

QWEN = (
    "{% if tools %}# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    'Answer with <tool_call>{"name": …, "arguments": …}</tool_call>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}:{{ c.function.arguments.items() | list }}"
    "</tool_call>{% endfor %}{% if m.tool_call_id %}[{{ m.tool_call_id }}]{% endif %}<|im_end|>\n{% endfor %}"
)
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
QWEN_TOOLS = QWEN + OPENING  # calls as Hermes writes them, no reasoning
# The model opens the block that it thinks in; the next template opens it itself.
QWEN_THINKING = QWEN_TOOLS + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
DEEPSEEK = QWEN + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}{# </think> #}"
LLAMA = QWEN_TOOLS.replace("<tool_call>", "<|python_tag|>").replace("</tool_call>", "")
MISTRAL = QWEN_TOOLS.replace("<tool_call>", "[TOOL_CALLS]").replace("</tool_call>", "")
# Takes tools, but says in no known way how they are called.
NEITHER = "{% for t in tools or [] %}{{ t }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
