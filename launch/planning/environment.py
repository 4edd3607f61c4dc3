"""What this machine has and can do, one finding after the other."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from adaptive.ops.backend import explain, operations

OK, MISSING, BROKEN = "ok", "missing", "broken"
# Distribution -> what needs it. The first group is what `pip install .[train]` brings.
_NEEDED = {
    "deepspeed": "training",
    "megatron-core": "tensor and sequence parallelism",
    "pydantic": "recipes",
    "omegaconf": "recipes",
    "safetensors": "checkpoints",
    "tensorboard": "event files and pictures",
}
_OPTIONAL = {
    "triton": "our kernels, on NVIDIA GPUs",
    "flash-attn": "attention, on NVIDIA GPUs",
    "transformer-engine": "megatron-core's own layers",
    "tokenizers": "data.tokenizer=FILE",
    "transformers": "wrapping its models",
    "matplotlib": "plots of comparisons",
    "scikit-learn": "the digits of the diffusion recipes",
}
_VARIABLES = (
    "ADAPTIVE_BACKEND",
    "TRITON_INTERPRET",
    "DS_ACCELERATOR",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MASTER_ADDR",
    "MASTER_PORT",
    "WORLD_SIZE",
)
# What attention sees is [tokens, heads, width]; every other operation, [tokens, width].
_HEADS = {"ring_attention", "varlen_attention", "varlen_cross_attention"}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        section: heading that it stands under.
        name: what was looked at.
        said: what was found.
        state: "ok", "missing" (something optional) or "broken" (training cannot work).
    """

    section: str
    name: str
    said: str
    state: str = OK


def report() -> list[Finding]:
    """Print every finding as it is made; returns those that keep training from working."""
    broken, section = [], ""
    for finding in findings():
        if finding.section != section:
            section = finding.section
            print(f"\n{section}")
        mark = {OK: " ", MISSING: "-", BROKEN: "!"}[finding.state]
        print(f"{mark} {finding.name:<22} {finding.said}", flush=True)
        if finding.state == BROKEN:
            broken.append(finding)
    names = ", ".join(finding.name for finding in broken)
    print(f"\n{'training cannot work: ' + names if broken else 'everything needed is here'}")
    return broken


def findings() -> Iterator[Finding]:
    """All that is looked at, in order."""
    yield from _machine()
    yield from _torch()
    yield from _packages()
    yield from _implementations()
    yield from _trials()


def _machine() -> Iterator[Finding]:
    section = "machine"
    yield Finding(section, "system", f"{platform.system()} {platform.release()}, {_processor()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(section, "cores", f"{cores}, torch uses {torch.get_num_threads()} threads")
    yield Finding(section, "memory", _memory())
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield Finding(section, "disk", f"{free:.0f} GiB free in {Path.cwd()}")
    yield Finding(section, "python", f"{platform.python_version()} at {sys.executable}")
    for name in _VARIABLES:
        if name in os.environ:
            yield Finding(section, name, os.environ[name])


def _torch() -> Iterator[Finding]:
    section = "torch"
    yield Finding(section, "version", torch.__version__)
    if not torch.cuda.is_available():
        built = "built without CUDA" if torch.version.cuda is None else "CUDA sees no GPU"
        yield Finding(section, "GPU", f"none ({built}): ranks run on the CPU over gloo, float32")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability = f"{found.major}.{found.minor}"
        memory = found.total_memory / 2**30
        said = f"{found.name}, {memory:.0f} GiB, compute capability {capability}"
        yield Finding(section, f"GPU {index}", said)
    backends = [
        name
        for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available()))
        if there
    ]
    needed = "nccl" if torch.cuda.is_available() else "gloo"
    state = OK if needed in backends else BROKEN
    yield Finding(section, "process groups", f"{', '.join(backends) or 'none'}", state)


def _packages() -> Iterator[Finding]:
    section = "packages"
    for name, use in _NEEDED.items():
        found = _version(name)
        said = f"{found} ({use})" if found else f"not installed, needed for {use}: pip install ."
        yield Finding(section, name, said if found else said + "[train]", OK if found else BROKEN)
    for name, use in _OPTIONAL.items():
        found = _version(name)
        said = f"{found} ({use})" if found else f"not installed; would serve {use}"
        yield Finding(section, name, said, OK if found else MISSING)
    compiler = shutil.which("g++") and (_version("ninja") or shutil.which("ninja"))
    said = "found" if compiler else "not found: DeepSpeed's shared-memory collective is not built"
    yield Finding(section, "ninja and g++", said, OK if compiler else MISSING)
    ours = Path(__file__).resolve().parents[2]
    for name in ("adaptive", "parallel"):
        spec = find_spec(name)
        where = Path(spec.origin).resolve().parents[1] if spec and spec.origin else None
        if where != ours:
            said = f"imported from {where}, not from {ours}: another distribution has this name"
            yield Finding(section, name, said, BROKEN)


def _implementations() -> Iterator[Finding]:
    """For every operation, what runs on this machine's devices, and why nothing else does."""
    cases = [(torch.device("cpu"), torch.float32)]
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        cases = [(device, torch.bfloat16), (device, torch.float32)]
    try:
        names = operations()
    except Exception as error:
        yield Finding("operations", "import", _error_line(error), BROKEN)
        return
    for device, dtype in cases:
        section = f"operations on {device}, {str(dtype).removeprefix('torch.')}"
        for name in names:
            shape = (64, 8, 64) if name in _HEADS else (64, 512)
            try:
                said = explain(name, torch.zeros(shape, dtype=dtype, device=device))
            except Exception as error:
                yield Finding(section, name, _error_line(error), BROKEN)
                continue
            yield Finding(section, name, next(k for k, v in said.items() if v == "chosen"))
            for other, why in said.items():
                if why != "chosen":
                    yield Finding(section, "", f"  not {other}: {_reason(why)}")


def _reason(why: str) -> str:
    return "could, but the chosen one is preferred" if why == "available" else why


def _error_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _trials() -> Iterator[Finding]:
    """Does it compute? And how fast are matrix products in the types that matter?"""
    section = "trials"
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        rate = _matmul_rate(device, dtype, size=4096 if cuda else 512)
        name = str(dtype).removeprefix("torch.")
        slow = dtype != torch.float32 and not cuda and rate < 10e9
        said = f"{rate / 1e9:,.0f} GFLOP/s" + (": too slow to train in" if slow else "")
        yield Finding(section, f"{name} products", said)
    try:
        begun = time.perf_counter()
        loss = _small_step(device)
        seconds = time.perf_counter() - begun
        yield Finding(
            section, "routed decoder", f"forward and backward, {loss:.2f}, {seconds:.1f}s"
        )
    except Exception as error:  # whatever it is, it is what the user wants to know
        yield Finding(section, "routed decoder", _error_line(error), BROKEN)


def _small_step(device: torch.device) -> float:
    from adaptive import RoutingTape
    from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
    from adaptive.models import Decoder, DecoderConfig

    routing = MixtureOfDepthsConfig(capacity=0.25)
    config = DecoderConfig(dim=64, num_layers=2, num_heads=4, mixture_of_depths=routing)
    model = Decoder(config).to(device)
    ids_BS = torch.randint(0, 256, (2, 64), device=device)
    with RoutingTape(model) as tape:
        loss = model.token_losses(ids_BS, ids_BS).mean()
    (loss + tape.loss()).backward()
    if not all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters()):
        raise ArithmeticError("a gradient is missing or not finite")
    return float(loss.detach())


def _matmul_rate(device: torch.device, dtype: torch.dtype, *, size: int) -> float:
    """Operations a second of a square product; the best of three."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):  # the first warms up
        begun = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        left = os.sysconf("SC_AVPHYS_PAGES") * size
    except (ValueError, OSError, AttributeError):
        return "unknown"
    return f"{pages * size / 2**30:.1f} GiB, {left / 2**30:.1f} GiB free"
