"""What the machine is good at."""

import torch


def has_fast_bf16(device: torch.device | str | None = None) -> bool:
    """Whether bfloat16 products are faster there than float32: a GPU that has them, or a CPU with AMX or AVX512-BF16.

    Args:
        device: Where; by default the machine's accelerator if it has one, else the CPU.
    """
    kind = torch.device(device).type if device is not None else None
    if kind == "cuda" or (kind is None and torch.cuda.is_available()):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind not in (None, "cpu") or (kind is None and torch.accelerator.is_available()):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def full_float32_products(device: torch.device | str) -> bool:
    """Whether float32 matrix products there keep all of float32, which TF32 and bfloat16 shortcuts do not."""
    backend = torch.backends.cuda if torch.device(device).type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("none", "ieee")


def adds_bf16_in_float32(device: torch.device | str) -> bool:
    """Whether products of bfloat16 matrices can be had in float32 there: on NVIDIA's GPUs that have bfloat16."""
    if torch.device(device).type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
