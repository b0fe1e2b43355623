"""Starting: what is missing or does not fit is said in one line, at once; what fits becomes vLLM's arguments."""

import json
from pathlib import Path

import pytest
import torch

from services.llm.fit import BaseLM
from services.llm.server import fitting_catalog, vllm_arguments
from services.llm.settings import Settings
from tests.llm.conftest import CONTEXT, make_assistant, start


def refusal(base_lm_dir: Path, models_dir: Path, **environment: str) -> str:
    """The one line that the service ends with."""
    process = start(base_lm_dir, models_dir, **environment)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    lines = stderr.decode().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_base_lm_not_prepared(tmp_path: Path) -> None:
    assert "basalt models prepare" in refusal(tmp_path / "nothing", tmp_path)


def test_base_lm_without_weights(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    assert "safetensors" in refusal(tmp_path, tmp_path)


def test_base_lm_of_another_kind(tiny_llama: Path, tmp_path: Path) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    line = refusal(tmp_path, tmp_path)
    assert "GPT2LMHeadModel" in line
    assert "LlamaForCausalLM" in line


def test_no_assistant(tiny_llama: Path, tmp_path: Path) -> None:
    assert "BASALT_MODELS_DIR" in refusal(tiny_llama, tmp_path)


def test_assistant_for_another_width(tiny_llama: Path, tmp_path: Path) -> None:
    make_assistant(tmp_path, "wide", tiny_llama)
    manifest = json.loads((tmp_path / "wide" / "manifest.json").read_text())
    manifest["base_lm"]["lm_dim"] = 4096
    (tmp_path / "wide" / "manifest.json").write_text(json.dumps(manifest))
    line = refusal(tiny_llama, tmp_path)
    assert "4096" in line
    assert "64" in line


def test_changed_lora(tiny_llama: Path, tmp_path: Path) -> None:
    make_assistant(tmp_path, "red", tiny_llama, lora_seed=1)
    with (tmp_path / "red" / "lora" / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    assert "digest" in refusal(tiny_llama, tmp_path)


def test_setting_that_makes_no_sense(tiny_llama: Path, tmp_path: Path) -> None:
    assert "port" in refusal(tiny_llama, tmp_path, BASALT_LLM_PORT="99999")


def test_settings_and_assistants_become_vllms_arguments(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_assistant(tmp_path, "red", tiny_llama, lora_seed=1)
    make_assistant(tmp_path, "plain", tiny_llama)
    monkeypatch.setenv("BASALT_MODELS_DIR", str(tmp_path))
    monkeypatch.setenv("BASALT_LLM_KV_CACHE_GIB", "2")
    monkeypatch.setenv("BASALT_VERSIONS_DIR", str(tmp_path / "versions"))
    monkeypatch.setenv("BASALT_LLM_MAX_LORA_RANK", "4")
    settings, base_lm = Settings(), BaseLM.read(tiny_llama)

    arguments = vllm_arguments(settings, base_lm, list(fitting_catalog(settings, base_lm).local.values()))

    assert settings.kv_cache_gib == 2
    assert f"--max-model-len={CONTEXT}" in arguments
    assert "--max-lora-rank=8" in arguments
    fast = torch.cuda.is_available() or torch.cpu.get_capabilities().get("avx512_bf16")
    assert f"--dtype={'bfloat16' if fast else 'float32'}" in arguments
