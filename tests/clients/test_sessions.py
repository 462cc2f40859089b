"""Third-party clients against the bundled model: chat, streaming, tools and structured output where they have them.

The model is too small to call a tool by itself, so calls are forced, and what is checked is their form.
"""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.third_party import MODEL, SESSIONS, Clients

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("script", SESSIONS)
def test_a_clients_session(clients: Clients, url: str, script: str) -> None:
    seen = clients.session(script, url)
    assert tuple(seen) == SESSIONS[script]
    if script == "openai_session.py":
        assert seen["errors"] == ["temperature", "messages", "model", "max_tokens"]


def test_the_llm_command(clients: Clients, url: str, tmp_path: Path) -> None:
    place = f'api_base: "{url}/v1"\n  model_name: {MODEL}\n  api_key_name: none\n'
    models = f"- model_id: tiny\n  {place}  supports_tools: true\n  supports_schema: true\n"
    models += f"- model_id: tiny-text\n  {place}  completion: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(models)
    environ = {"LLM_USER_PATH": str(tmp_path)}

    def llm(*arguments: str, text: str = "") -> str:
        return clients.run("llm", *arguments, environ=environ, text=text)

    brief = ("-m", "tiny", "-o", "temperature", "0", "-o", "max_tokens", "8")
    whole = llm("What is the capital of France?", *brief, "--no-stream")
    assert whole.strip()
    assert llm("What is the capital of France?", *brief) == whole
    assert llm("-c", "And of Italy?", *brief).strip()
    assert llm("Summarise this", *brief, "-s", "Be brief.", text="The sea is blue.").strip()
    assert llm("One, two, three,", "-m", "tiny-text", "-o", "max_tokens", "4").strip()
    (logged,) = json.loads(llm("logs", "-n", "1", "--json"))
    assert logged["model"] == "tiny-text"

    number = {"type": "integer", "minimum": 0, "maximum": 99}
    schema = {"type": "object", "properties": {"n": number}, "required": ["n"], "additionalProperties": False}
    formed = llm("A number", "-m", "tiny", "-o", "temperature", "0", "--schema", json.dumps(schema))
    assert 0 <= json.loads(formed)["n"] <= 99

    # The tool is offered; whether it is called is the model's choice.
    function = "def add(a: int, b: int) -> int:\n    'Add two numbers'\n    return a + b\n"
    assert llm("What is 2 + 3?", *brief, "--functions", function, "--td").strip()


QUESTIONS = (
    ("The capital of France is", " Paris", " a banana that is blue"),
    ("Two plus two equals", " four", " the purple elephant's"),
    ("The opposite of hot is", " cold", " seventeen umbrellas of"),
    ("The sun rises in the", " east", " bottle keyboard under"),
)


@pytest.mark.parametrize("tokenized", [True, False])
def test_lm_evals_local_completions(clients: Clients, url: str, tmp_path: Path, tokenized: bool) -> None:
    rows = [{"question": q, "good": good, "bad": bad} for q, good, bad in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
    task: dict[str, Any] = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    task |= {"doc_to_text": "{{question}}", "target_delimiter": ""}
    choose = {**task, "task": "choose", "output_type": "multiple_choice", "doc_to_choice": "{{[good, bad]}}"}
    choose |= {"doc_to_target": 0, "metric_list": [{"metric": "acc"}]}
    write = {**task, "task": "write", "output_type": "generate_until", "doc_to_target": "{{good}}"}
    write |= {"generation_kwargs": {"until": ["."], "max_gen_toks": 6, "do_sample": False}}
    write |= {"metric_list": [{"metric": "exact_match"}]}
    for name, value in (("choose", choose), ("write", write)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps(value))

    place = f"model={MODEL},base_url={url}/v1/completions,tokenizer_backend=remote,tokenized_requests={tokenized}"
    clients.run(
        "lm_eval",
        *("--model", "local-completions", "--model_args", f"{place},num_concurrent=2,max_retries=1"),
        *("--include_path", str(tmp_path / "tasks"), "--tasks", "choose,write", "--batch_size", "2"),
        *("--output_path", str(tmp_path / "out"), "--log_samples"),
    )
    (file,) = tmp_path.glob("out/**/results_*.json")
    results = json.loads(file.read_text())["results"]
    assert results["choose"]["acc,none"] == 1.0
    assert "exact_match,none" in results["write"]
    (file,) = tmp_path.glob("out/**/samples_write_*.jsonl")
    written = {row["doc"]["question"]: row["resps"][0][0] for row in map(json.loads, file.read_text().splitlines())}
    assert list(written) == [question for question, _, _ in QUESTIONS]

    (file,) = tmp_path.glob("out/**/samples_choose_*.jsonl")
    sample = json.loads(file.read_text().splitlines()[0])
    question, good, _ = QUESTIONS[0]
    body = {"prompt": question + good, "echo": True, "logprobs": 0, "max_tokens": 0}
    (scored,) = httpx.post(f"{url}/v1/completions", json=body).json()["choices"]
    logprobs, offsets = scored["logprobs"]["token_logprobs"], scored["logprobs"]["text_offset"]
    after = sum(x for x, offset in zip(logprobs, offsets, strict=True) if offset >= len(question))
    assert float(sample["resps"][0][0][0]) == pytest.approx(after, abs=1e-3)
