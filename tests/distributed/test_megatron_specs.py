"""Routed layers in megatron-core's GPTModel: equal training at tensor 1 and 2, really routed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from adaptive.models.weights.megatron_specs import (
    MegatronRMSNorm,
    block_of,
    hyperspherical_spec,
    mixture_of_depths_spec,
    skip_layer_spec,
    with_norm,
)
from adaptive.routing.gumbel import GumbelSchedule
from adaptive.routing.tape import RoutingTape
from parallel import megatron
from parallel.mesh import Mesh
from tests.ranks import run_ranks

LAYERS, SEQ_LEN, BATCH = 2, 16, 2


def _model(family: str, tensor: int) -> nn.Module:
    mesh = Mesh.single()
    if tensor > 1:
        mesh = Mesh.create(tensor=tensor)
    else:
        megatron.initialize(tensor=1, context=1, expert=1)
    megatron.seed(0)
    config = megatron.core("transformer.transformer_config").TransformerConfig(
        num_layers=LAYERS,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        num_moe_experts=4 if family == "hyperspherical" else None,
        moe_router_topk=2,
        moe_token_dispatcher_type="allgather",
        tensor_model_parallel_size=tensor,
        # megatron trains experts on tensor ranks with sequence parallelism only.
        sequence_parallel=tensor > 1 and family == "hyperspherical",
        use_cpu_initialization=True,
        init_method_std=0.2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
    )
    specs = megatron.core("models.gpt.gpt_layer_specs")
    dense = specs.get_gpt_layer_local_spec(num_experts=config.num_moe_experts)
    routed = {
        "mixture_of_depths": lambda: mixture_of_depths_spec(dense, capacity=0.25),
        "skip_layer": lambda: skip_layer_spec(dense, mesh=mesh, schedule=GumbelSchedule(noise=0.0)),
        "hyperspherical": lambda: with_norm(hyperspherical_spec(dense)),
    }[family]()
    return megatron.core("models.gpt").GPTModel(
        config,
        # megatron's own gate needs Transformer Engine: with experts, every router is ours.
        block_of(
            [routed if config.num_moe_experts else dense, routed],
            layer_norm=MegatronRMSNorm if config.num_moe_experts else None,
        ),
        vocab_size=64,
        max_sequence_length=SEQ_LEN,
        position_embedding_type="rope",
    )


def _train(family: str, tensor: int) -> tuple[list[float], list[int], dict[str, float]]:
    """Losses of three steps, tokens executed in each, and how far every router moved."""
    model = _model(family, tensor)
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 64, (3, BATCH, SEQ_LEN + 1), generator=draw)
    places = torch.arange(SEQ_LEN).expand(BATCH, -1)
    mask = torch.ones(1, 1, SEQ_LEN, SEQ_LEN, dtype=torch.bool).triu(1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, executed = [], []
    for batch in ids:
        with RoutingTape() as tape:
            per_token = model(batch[:, :-1], places, mask, labels=batch[:, 1:])
        loss = per_token.mean() + tape.loss()
        optimizer.zero_grad()
        loss.backward()
        _sum_sequence_parallel(model)
        optimizer.step()
        losses.append(float(per_token.mean().detach()))
        executed += [int(record.executed) for record in tape.records]
    words = ("router", "predictor", "cosine")
    moved: dict[str, Any] = {
        name: float((p.detach() - before[name]).abs().max())
        for name, p in model.named_parameters()
        if any(word in name for word in words)
    }
    return losses, executed, moved


def _sum_sequence_parallel(model: nn.Module) -> None:
    """What megatron's `finalize_model_grads` does, without its own wrapper of the model."""
    group = megatron.core("parallel_state").get_tensor_model_parallel_group()
    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False) and parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=group)


@pytest.mark.parametrize("family", ["mixture_of_depths", "skip_layer", "hyperspherical"])
def test_three_steps_at_tensor_1_and_2_have_equal_loss(family: str) -> None:
    whole, executed, moved = run_ranks(_train, 1, family, 1, timeout=120)[0]
    for losses, counts, _ in run_ranks(_train, 2, family, 2, timeout=120):
        assert losses == pytest.approx(whole, rel=1e-5)
        assert counts == executed
    assert len(set(whole)) == 3
    assert moved
    assert all(moved.values()), moved
    if family == "mixture_of_depths":
        assert executed == [BATCH * SEQ_LEN // 4] * 3
    if family == "skip_layer":
        assert all(0 < count < BATCH * SEQ_LEN for count in executed)


def _positions() -> float:
    """With every token chosen and weight one, the routed layer is megatron's own layer."""
    model = _model("mixture_of_depths", 1)
    layer = model.decoder.layers[1]
    routing = layer.routing
    routing.capacity, routing.weight = 1.0, "tanh_norm"
    nn.init.zeros_(routing.router.weight)
    hidden = torch.randn(SEQ_LEN, BATCH, 32)
    mask = torch.ones(1, 1, SEQ_LEN, SEQ_LEN, dtype=torch.bool).triu(1)
    rotary = model.rotary_pos_emb(SEQ_LEN)
    routed, _ = layer(hidden, mask, rotary_pos_emb=rotary)
    own, _ = layer.compute(hidden_states=hidden, attention_mask=mask, rotary_pos_emb=rotary)
    return float((routed - own).abs().max())


def test_all_tokens_chosen_give_the_layer_of_megatron_itself() -> None:
    assert run_ranks(_positions, 1)[0] < 1e-5
