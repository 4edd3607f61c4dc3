"""Compile every kernel for a Hopper GPU on a machine that has none.

    python -m tests.adaptive.ops.compile_kernels [--resources] [--quick]

Triton needs a driver only to launch. One that names the target and nothing else is put in its
place, and every launch becomes a compilation down to machine code. Prints one line a kernel:
name, shared memory, and with --resources registers, bytes of stack (spills) and instructions: the
matrix products (wgmma are Hopper's), asynchronous copies of 16 bytes to shared memory, loads of 16
bytes. Products of 16-bit numbers that are not Hopper's end it with an error.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SHARED_LIMIT = 232_448  # bytes a block of compute capability 9.0 may use

os.environ["TRITON_INTERPRET"] = "0"


class OfflineDriver:
    """What compilation asks of a driver."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead_of_launching(compiled: list) -> None:
    """Every `kernel[grid](...)` compiles, is reported and added to `compiled`."""
    import triton
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(OfflineDriver())
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        if kernel not in compiled:
            compiled.append(kernel)
            report(kernel)
        return kernel

    def every_config(self, *args, grid, warmup=False, **kwargs):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            self.fn.run(*args, grid=grid, warmup=True, **kwargs, **config.all_kwargs())

    JITFunction.run = compile_only
    Autotuner.run = every_config


def report(kernel) -> None:
    shared = kernel.metadata.shared
    line = f"{kernel.metadata.name} {shared} bytes"
    if "--resources" in sys.argv:
        line += f" {kernel.metadata.num_warps} warps {resources(kernel.asm['cubin'])}"
        line += f" {instructions(kernel.asm['ptx'])}"
    print(line, flush=True)
    low = re.search(r"tt\.dot .*xb?f16", kernel.asm["ttir"])
    assert not low or "wgmma.mma_async" in kernel.asm["ptx"], f"{line}: products without wgmma"
    assert shared <= SHARED_LIMIT, f"{line}: must be at most {SHARED_LIMIT} bytes"


def call_every_kernel(dtype, width: int, head_dim: int) -> None:
    """One forward and backward of every op whose kernels are ours. Values mean nothing here."""
    import torch

    from adaptive.ops.expert_feed_forward import KernelExpertFeedForward
    from adaptive.ops.grouped_linear import KernelGroupedLinear
    from adaptive.ops.kernels import merge, pack, parameter_attention, permute, routing
    from adaptive.ops.operators import attention_backward, attention_forward
    from adaptive.ops.varlen_attention import attention_with_lse
    from adaptive.routing.layout import TokenLayout

    def draw(*shape: int):
        return torch.zeros(*shape, dtype=dtype, requires_grad=True)

    def run(*outputs) -> None:
        torch.autograd.backward(outputs, [torch.zeros_like(y) for y in outputs])

    index = torch.arange(16)
    run(pack.pack(draw(64, width), index))
    run(pack.combine(draw(64, width), draw(16, width), index, draw(16)))
    run(pack.combine(draw(64, width), draw(16, width), index))
    run(pack.combine_(draw(64, width) * 1, draw(16, width), index, draw(16)))
    pairs = torch.arange(32)
    order, starts = torch.arange(64), torch.arange(0, 65, 4)
    for share in (None, draw(64).detach()):
        merge.group_sum(draw(64, width).detach(), share, order, starts)
    run(permute.permute(draw(16, width), pairs, 2))
    run(permute.unpermute(draw(32, width), pairs, draw(16, 2), (16, 2)))
    keys, queries = TokenLayout.from_lengths([64, 64]), TokenLayout.from_lengths([16, 16])
    for same in (True, False):
        q = draw(128 if same else 32, 4, head_dim)
        k, v = draw(128, 2, head_dim), draw(128, 2, head_dim)
        asked = keys if same else queries
        out, _ = attention_with_lse(q, k, v, queries=asked, keys=None if same else keys)
        run(out)
    # As ranks of a ring compute them: parts of a softmax.
    parts = q.detach(), k.detach(), v.detach(), asked.cu_seqlens, keys.cu_seqlens
    where = (*parts[3:], asked.positions, keys.positions, 64, 64, 2)
    out, lse = attention_forward(*parts[:3], *where, part=True)
    attention_backward(out.to(dtype), None, *parts[:3], None, lse, *where, delta_HQ=lse)
    for activation in ("l2_norm_gelu", "gelu_l2_norm"):
        tokens = draw(16, width), draw(width, width), draw(width, width)
        run(parameter_attention.parameter_attention(*tokens, scale=1.0, activation=activation))
    routing.highest_columns(draw(4, width).detach(), 16)
    routing.order_by_unit(torch.zeros(512, dtype=torch.int64), width // 8)
    rows = torch.full((8,), 4)
    run(KernelGroupedLinear.apply(draw(32, width), draw(8, width, width), rows))
    for activation, factor in (("swiglu", 2), ("gelu", 1)):
        experts = draw(8, factor * width, width), draw(8, width, width)
        call = KernelExpertFeedForward.apply
        run(call(draw(16, width), *experts, pairs, rows, draw(16, 2), 2, activation))


INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "copies": r"cp\.async\.cg\S* .*, (?:0x10|16)\b",
    "loads": r"ld\.global\S*\.v4\.b32",
}


def instructions(ptx: str) -> str:
    """ "wgmma:n copies:n …", without those that do not occur."""
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()}
    return " ".join(f"{name}:{count}" for name, count in counts.items() if count)


def resources(cubin: bytes) -> str:
    """ "REG:n STACK:n …" as the disassembler reports it."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    return " ".join(re.findall(r"(?:REG|STACK):\d+", done.stdout))


def main() -> None:
    compiled: list = []
    compile_instead_of_launching(compiled)
    import torch

    if "--quick" not in sys.argv:
        call_every_kernel(torch.bfloat16, 1024, 64)
        call_every_kernel(torch.bfloat16, 64, 256)
        call_every_kernel(torch.float32, 1000, 80)
    call_every_kernel(torch.bfloat16, 1024, 128)
    print(f"{len(compiled)} kernels compiled")


if __name__ == "__main__":
    main()
