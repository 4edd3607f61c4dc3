"""Training steps of 350M-class models: what does each method's sparsity buy in wall-clock time?

    PYTHONPATH=. python benchmarks/step.py [--quick] [--only dense,mod] [--out FILE]

Dense, MoD (12.5% in every second layer), MoE (8 experts, top 2, a quarter of the feed-forward
each: the dense model's FLOPs a token are kept by half), SkipLayer (density 0.5), TokenFormer and
SPRINT (a DiT-L). Forward, backward and AdamW in bfloat16. For each: tokens a second, MFU by
executed and by nominal FLOPs (against the matmul rate measured here), peak memory. Then one block
routed at 12.5% against the same block dense, S 4,096, which issue 8 wants within 1.25 times its
share of FLOPs.

On a GPU the results go to benchmarks/results/step-<device>.json. Without one, models are tiny,
float32, nothing is saved unless --out says where, and the numbers say only that everything runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, interleave, machine, median_ratio, medians
from torch import Tensor, nn

from adaptive import MixtureOfDepths, RoutingTape
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.blocks.pattention import PattentionConfig
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.flops import executed_flops, nominal_flops, planned_flops
from adaptive.models import Decoder, DecoderConfig, DiffusionConfig, DiffusionTransformer
from adaptive.models.decoder.model import build_layer
from adaptive.routing.layout import TokenLayout
from parallel.mesh import Mesh

Step = Callable[[], Tensor]


def decoders(base: DecoderConfig) -> dict[str, DecoderConfig]:
    """The same width and depth, each method with its paper's defaults."""
    tokens = base.dim
    experts = MixtureOfExpertsConfig(num_experts=8, top_k=2, ffn_dim=base.ffn_width // 4)
    pattention = PattentionConfig(tokens=tokens, ffn_tokens=4 * tokens)
    return {
        "dense": base,
        "mod": replace(base, mixture_of_depths=MixtureOfDepthsConfig(capacity=0.125)),
        "moe": replace(base, mixture_of_experts=experts),
        "skip_layer": replace(base, skip_layer=SkipLayerConfig(density=0.5)),
        "tokenformer": replace(base, norm="parameter_free", pattention=pattention),
    }


def language_loss(config: DecoderConfig, batch: int, device: torch.device) -> Callable[..., Tensor]:
    ids_BS = torch.randint(config.vocab_size, (batch, config.max_seq_len + 1), device=device)

    def loss(model: Decoder) -> Tensor:
        return model.token_losses(ids_BS[:, :-1], ids_BS[:, 1:].contiguous()).mean()

    return loss


def flow_loss(config: DiffusionConfig, batch: int, device: torch.device) -> Callable[..., Tensor]:
    shape = (batch, config.channels, config.image_size, config.image_size)
    x, noise = torch.randn(2, *shape, device=device)
    t = torch.rand(batch, device=device)
    y = torch.randint(config.num_classes, (batch,), device=device)

    def loss(model: DiffusionTransformer) -> Tensor:
        dtype = next(model.parameters()).dtype
        mixed = torch.lerp(x, noise, t[:, None, None, None])
        velocity = model(mixed.to(dtype), t.to(dtype), y)
        return (velocity.float() - (noise - x)).square().mean()

    return loss


def run(
    model: nn.Module,
    loss_of: Callable[..., Tensor],
    batch: int,
    seq_len: int,
    rate: float,
    rounds: int,
) -> dict[str, Any]:
    """Time of a whole training step and what follows from it."""
    cuda = next(model.parameters()).is_cuda
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
    tape = RoutingTape(model)

    def step() -> None:
        nonlocal tape
        with RoutingTape(model) as tape:
            loss = loss_of(model)
        (loss + tape.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = medians(interleave({"step": step}, rounds=rounds))["step"]
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "milliseconds": seconds * 1e3,
        "tokens_per_second": batch * seq_len / seconds,
    }
    executed = executed_flops(model, tape.records, batch, seq_len, backward=True).item()
    nominal = nominal_flops(model, batch, seq_len, backward=True)
    result |= {"executed_flops": executed, "nominal_flops": nominal}
    result |= {"mfu_executed": executed / seconds / rate, "mfu_nominal": nominal / seconds / rate}
    if cuda:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def routed_block(device: torch.device, *, rounds: int) -> dict[str, float]:
    """One block at capacity 0.125 against itself dense, forward and backward.

    On a GPU as wide as an 8B model's, so that the routed block too takes longer to run than Python
    to launch.
    """
    base = DecoderConfig(dim=64, num_layers=1, num_heads=4, ffn_dim=192, max_seq_len=256)
    dtype, batch, seq_len = torch.float32, 1, 256
    if device.type == "cuda":
        base = DecoderConfig(dim=4096, num_layers=1, num_heads=32, max_seq_len=4096)
        dtype, batch, seq_len = torch.bfloat16, 4, 4096
    block = build_layer(base, 0, Mesh.single())
    routed = MixtureOfDepths(block, base.dim, capacity=0.125, predictor="none").to(device, dtype)
    x = torch.randn(batch, seq_len, base.dim, device=device, dtype=dtype, requires_grad=True)
    layout = TokenLayout.dense(batch, seq_len, device)

    grad = torch.ones_like(x)
    leaves = [x, *routed.parameters()]

    def forget() -> None:
        # As after an optimizer's step: adding to old gradients would cost both blocks the same.
        for leaf in leaves:
            leaf.grad = None

    def dense() -> None:
        forget()
        block(x.flatten(0, 1), layout=layout).backward(grad.flatten(0, 1))

    def sparse() -> None:
        forget()
        routed(x).backward(grad)

    seconds = interleave({"dense": dense, "routed": sparse}, rounds=rounds)
    share = planned_flops(routed, batch, seq_len, backward=True) / planned_flops(
        block, batch, seq_len, backward=True
    )
    ratio = median_ratio(seconds, "routed", "dense")
    return {"time_ratio": ratio, "flop_ratio": share, "over_flops": ratio / share}


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / medians(interleave({"mm": lambda: a @ b}, rounds=9))["mm"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, half the batch")
    parser.add_argument("--only", default="", help="models, separated by commas; block: the block")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cpu"), torch.float32
    base = DecoderConfig(dim=64, num_layers=2, num_heads=4, ffn_dim=192, max_seq_len=64)
    pictures = DiffusionConfig(dim=64, num_heads=4, image_size=16, middle_depth=2)
    batch, images, rounds = 2, 2, 2
    if cuda:
        device, dtype = torch.device("cuda"), torch.bfloat16
        base = DecoderConfig(32768, dim=1024, num_layers=24, num_heads=16, max_seq_len=4096)
        pictures = DiffusionConfig.of_size("L")
        batch, images, rounds = (2, 64, 5) if options.quick else (4, 128, 15)
    rate = matmul_rate(device, dtype)
    versions = machine()
    print(f"{versions['machine']}, torch {versions['torch']}, {rate / 1e12:.3f} TFLOP/s matmul")
    only = set(filter(None, options.only.split(",")))
    results: dict[str, dict[str, Any]] = {}
    configs: dict[str, DecoderConfig | DiffusionConfig] = {**decoders(base), "sprint": pictures}
    for name, config in configs.items():
        if only and name not in only:
            continue
        torch.manual_seed(0)
        if isinstance(config, DecoderConfig):
            model: nn.Module = Decoder(config).to(device, dtype)
            loss, shape = language_loss(config, batch, device), (batch, config.max_seq_len)
        else:
            model = DiffusionTransformer(config).to(device, dtype)
            loss, shape = flow_loss(config, images, device), (images, config.tokens)
        found = results[name] = run(model, loss, *shape, rate, rounds)
        print(
            f"{name:<12}{found['parameters'] / 1e6:>7.1f}M {found['milliseconds']:>9.1f} ms "
            f"{found['tokens_per_second']:>10.0f} tokens/s  MFU executed "
            f"{found['mfu_executed']:.1%} nominal {found['mfu_nominal']:.1%}"
            + (f"  peak {found['peak_gib']:.1f} GiB" if cuda else ""),
            flush=True,
        )
        del model, loss
        gc.collect()
    block = None
    if not only or "block" in only:
        block = routed_block(device, rounds=rounds)
        asked = "" if not cuda else " (asked: at most 1.25)"
        print(
            f"block at 12.5%: {block['time_ratio']:.3f} of the dense time, "
            f"{block['flop_ratio']:.3f} of its FLOPs: {block['over_flops']:.2f}x{asked}"
        )
    out = options.out
    if out is None and cuda:
        out = RESULTS / f"step-{re.sub('[^a-z0-9]+', '-', versions['machine'].lower())}.json"
    if out is None:
        print("no GPU: models are tiny, nothing here says how fast a method is")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    written = {**versions, "matmul_rate": rate, "models": results, "block": block}
    out.write_text(json.dumps(written, indent=1) + "\n")
    print(f"results: {out}")


if __name__ == "__main__":
    main()
