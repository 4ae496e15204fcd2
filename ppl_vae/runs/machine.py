"""What the bits of a run depend on beside its spec and its data."""

import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("ppl-vae", "pyro-ppl", "torch", "numpy")


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, device and versions that compute here: where all are equal, so are all bits of a run."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return names[0] if names else platform.processor() or "unknown"
