"""What the machine is good at."""

import torch


def has_fast_bf16() -> bool:
    """Whether bfloat16 autocast is faster here than float32: a GPU that has it, or a CPU with AMX or AVX512-BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
