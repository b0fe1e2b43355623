"""Our norm and activation say what vLLM's own chains of torch operators say."""

import pytest
import torch

pytest.importorskip("vllm", reason="the llm extra is not installed")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("the kernels are a CPU's", allow_module_level=True)

from services.llm.kernels_cpu import FusedRMSNorm, InPlaceSiluAndMul

WIDTH = 96


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_same_as_native(dtype: torch.dtype, tokens: int) -> None:
    current_platform.import_kernels()
    torch.manual_seed(0)
    with set_current_vllm_config(VllmConfig()):
        norm, act = FusedRMSNorm(WIDTH, eps=1e-5, dtype=dtype), InPlaceSiluAndMul()
    norm.weight.data.normal_()
    x, residual = torch.randn(2, tokens, WIDTH).to(dtype)
    torch.testing.assert_close(norm.forward_cpu(x), norm.forward_native(x))
    expected = norm.forward_native(x.clone(), residual.clone())
    torch.testing.assert_close(norm.forward_cpu(x.clone(), residual.clone()), expected)
    wide = torch.randn(tokens, 2 * WIDTH).to(dtype)
    torch.testing.assert_close(act.forward_cpu(wide), act.forward_native(wide))


def test_a_norm_of_another_dtype_than_its_input_is_still_right() -> None:
    current_platform.import_kernels()
    with set_current_vllm_config(VllmConfig()):
        norm = FusedRMSNorm(WIDTH, eps=1e-5, dtype=torch.float32)
    x = torch.randn(3, WIDTH, dtype=torch.bfloat16)
    torch.testing.assert_close(norm.forward_cpu(x), norm.forward_native(x))
