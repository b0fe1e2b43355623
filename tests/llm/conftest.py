"""A real LLM service on a tiny base LM with random weights, and transformers/peft to compare it with."""

import base64
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from basalt.assistants import Manifest, seal
from tests.collector import Collector, collecting

LM_DIM = 64
CONTEXT = 1024
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SYSTEM = "You look at pictures and answer in one sentence."
TERSE = "One word only."
TEMPLATE = """\
{%- for message in messages %}
{%- if loop.first and message['role'] != 'system' %}
{{- '<|im_start|>system\n' }}SYSTEM{{ '<|im_end|>\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string %}{{ message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""".replace("SYSTEM", SYSTEM)

Prompt = Sequence[str | torch.Tensor]  # texts and images' embeddings, in order


@dataclass
class Service:
    """A running `python -m services.llm`."""

    url: str
    base_lm_dir: Path
    models_dir: Path
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def lines(self, request_id: str) -> list[dict[str, Any]]:
        """What its log says of a request."""
        self.log.seek(0)
        lines = [json.loads(line) for line in self.log.read().splitlines() if line.startswith(b'{"')]
        return [line for line in lines if line.get("request_id") == request_id]

    def post(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=120)

    def ask(self, model: str, content: object, **options: object) -> dict[str, Any]:
        """The response to one user message, greedy, always of `max_tokens` tokens."""
        return self.chat(model, [{"role": "user", "content": content}], **options)

    def chat(self, model: str, messages: list[Any], **options: object) -> dict[str, Any]:
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 12} | options
        body |= {"ignore_eos": True, "return_token_ids": True}
        response = self.post(body)
        assert response.status_code == 200, response.text
        return response.json()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast.from_pretrained(self.base_lm_dir)

    def embed(self, text: str) -> torch.Tensor:
        """The base LM's own embeddings [tokens, lm_dim] of `text`."""
        lm = AutoModelForCausalLM.from_pretrained(self.base_lm_dir, dtype=torch.float32)
        ids = self.tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return lm.get_input_embeddings()(ids)[0].detach()

    def reference(self, model: str, user: Prompt, max_tokens: int = 12) -> list[int]:
        """The greedy token ids of transformers (and peft) for one user message."""
        lm = AutoModelForCausalLM.from_pretrained(self.base_lm_dir, dtype=torch.float32)
        lora = self.models_dir / model / "lora"
        if lora.exists():
            lm = PeftModel.from_pretrained(lm, str(lora)).merge_and_unload()
        tokenizer = self.tokenizer()
        parts: list[torch.Tensor] = []
        for piece in _chat_pieces(user):
            if isinstance(piece, str):
                ids = tokenizer(piece, add_special_tokens=False, return_tensors="pt")["input_ids"]
                parts.append(lm.get_input_embeddings()(ids)[0])
            else:
                parts.append(piece)
        generated = lm.generate(
            inputs_embeds=torch.cat(parts)[None], max_new_tokens=max_tokens, do_sample=False, eos_token_id=-1
        )
        return generated[0].tolist()


def image_part(embeddings: torch.Tensor, uuid: str | None = None) -> dict[str, str]:
    """The content part the gateway would send."""
    blob = save({"embeddings": embeddings.contiguous()})
    return {
        "type": "image_embeds",
        "image_embeds": base64.b64encode(blob).decode(),
        "uuid": uuid or "sha256:" + hashlib.sha256(blob).hexdigest(),
    }


def token_ids(response: dict[str, Any]) -> list[int]:
    return response["choices"][0]["token_ids"]


def image(tokens: int, seed: int, width: int = LM_DIM) -> torch.Tensor:
    """Random embeddings [tokens, width] about as long as the tiny LM's own."""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) * 0.3


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _base_lm(tmp_path_factory.mktemp("tiny-llama"), LlamaForCausalLM, LlamaConfig)


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _base_lm(tmp_path_factory.mktemp("tiny-qwen2"), Qwen2ForCausalLM, Qwen2Config)


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="session")
def service(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Service]:
    """One base LM, two LoRA slots and as many assistants with LoRAs, one without, one with another chat template."""
    models_dir = tmp_path_factory.mktemp("llm") / "models"
    for seed, name in enumerate(("red", "blue"), start=1):
        make_assistant(models_dir, name, tiny_llama, lora_seed=seed)
    make_assistant(models_dir, "plain", tiny_llama)
    make_assistant(models_dir, "terse", tiny_llama, template=TEMPLATE.replace(SYSTEM, TERSE))
    yield from run_service(tiny_llama, models_dir, **collector.environment())


def run_service(base_lm_dir: Path, models_dir: Path, **environment: str) -> Iterator[Service]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile() as log:  # a pipe that nobody reads would fill up
        process = start(base_lm_dir, models_dir, port, stderr=log, **environment)
        service = Service(f"http://127.0.0.1:{port}", base_lm_dir, models_dir, process, log)
        try:
            _wait_until_healthy(service, log)
            yield service
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def start(
    base_lm_dir: Path,
    models_dir: Path,
    port: int = 8000,
    stderr: IO[bytes] | int = subprocess.PIPE,
    **environment: str,
) -> subprocess.Popen[bytes]:
    settings = {
        "BASALT_BASE_LM_DIR": str(base_lm_dir),
        "BASALT_MODELS_DIR": str(models_dir),
        "BASALT_LLM_PORT": str(port),
        "BASALT_LLM_DTYPE": "float32",
        "BASALT_VERSIONS_DIR": str(models_dir.parent / "versions"),
        "BASALT_HANDOFF_DIR": str(models_dir.parent / "handoff"),
        "BASALT_STORE": str(models_dir.parent / "objects"),
        "BASALT_LLM_MAX_LORAS": "2",
        "BASALT_LLM_MAX_KEPT_LORAS": "2",
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-m", "services.llm"]
    return subprocess.Popen(command, env=os.environ | settings | environment, stderr=stderr)


def make_assistant(
    models_dir: Path,
    name: str,
    base_lm_dir: Path,
    *,
    lora_seed: int | None = None,
    template: str = TEMPLATE,
    rank: int = 8,
    strength: float = 0.2,
) -> None:
    """An assistant with a random LoRA, as it is strong enough to change what the LM says."""
    directory = models_dir / name
    directory.mkdir(parents=True)
    lm_dim = json.loads((base_lm_dir / "config.json").read_text())["hidden_size"]
    save_file({"weight": torch.zeros(1)}, directory / "projector.safetensors")
    (directory / "chat_template.jinja").write_text(template)
    lora = None
    if lora_seed is not None:
        lm = AutoModelForCausalLM.from_pretrained(base_lm_dir, dtype=torch.float32)
        adapted = get_peft_model(lm, LoraConfig(r=rank, lora_alpha=16, target_modules=LORA_MODULES))
        random = torch.Generator().manual_seed(lora_seed)
        for weight_name, weight in adapted.named_parameters():
            if "lora_" in weight_name:
                weight.data = torch.randn(weight.shape, generator=random) * strength
        adapted.save_pretrained(directory / "lora")
        lora = {"dir": "lora", "digest": _digest(directory / "lora" / "adapter_model.safetensors"), "rank": rank}
    manifest = {
        "name": name,
        "tower": {"kind": "siglip", "id": "t", "image_size": 32, "tokens": 4, "width": 8, "fit": "resize"},
        "projector": {
            "file": "projector.safetensors",
            "digest": _digest(directory / "projector.safetensors"),
            "hidden": 8,
        },
        "base_lm": {"id": "tiny", "lm_dim": lm_dim, "context": CONTEXT, "image_token_id": 16},
        "lora": lora,
        "chat_template": "chat_template.jinja",
    }
    seal(directory, Manifest.model_validate(manifest))


def _base_lm(directory: Path, model_class: Any, config_class: Any) -> Path:
    """A causal LM with random weights, far from ties, and a byte-level tokenizer without merges of digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([SYSTEM, "user assistant system What is in the image? A dog on the grass."], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.save_pretrained(directory)
    config = config_class(
        vocab_size=len(fast),
        hidden_size=LM_DIM,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model_class(config).to(torch.float32).save_pretrained(directory)
    return directory


def _chat_pieces(user: Prompt) -> list[str | torch.Tensor]:
    """The prompt of one user message, cut at its images as TEMPLATE would write them."""
    pieces: list[str | torch.Tensor] = [f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"]
    for piece in user:
        if isinstance(piece, str):
            pieces.append(piece)
        else:
            pieces += [piece, "\n"]
    pieces.append("<|im_end|>\n<|im_start|>assistant\n")
    joined: list[str | torch.Tensor] = []
    for piece in pieces:  # neighbouring texts are tokenised as one
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def _wait_until_healthy(service: Service, log: IO[bytes], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if service.process.poll() is not None:
            log.seek(0)
            raise RuntimeError(f"the LLM service ended: {log.read().decode()[-4000:]}")
        try:
            if httpx.get(f"{service.url}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"the LLM service was not healthy after {seconds} s")


def _digest(file: Path) -> str:
    return "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
