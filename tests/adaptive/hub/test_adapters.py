"""Adapters of PEFT on adapted models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from adaptive.hub import adapt
from tests.adaptive.hub.families import some_ids, tiny, trained

peft = pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("family", "experts"), [("Llama", []), ("Qwen3Moe", ["mlp.experts.gate_up_proj"])]
)
def test_lora_trains_beside_the_routers_and_merges(
    family: str, experts: list[str], tmp_path: Path
) -> None:
    def adapted() -> Any:
        return trained(adapt(tiny(family), "mixture_of_depths", layers=[1, 3], capacity=0.5))

    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        target_parameters=experts or None,
        modules_to_save=["router", "predictor"],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(adapted(), config).train()
    ids = some_ids(2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("layers.1.self_attn.q_proj.lora_B" in name for name in moved)
    assert any("layers.1.routing.router.modules_to_save" in name for name in moved)
    if experts:
        assert any("layers.1.mlp.experts" in name for name in moved)

    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert not torch.allclose(logits, adapted()(ids).logits)
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(adapted(), tmp_path)
        torch.testing.assert_close(loaded(input_ids=ids).logits, logits)
        said = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=False)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, logits, atol=1e-4, rtol=1e-4)
        again = merged.generate(ids, max_new_tokens=4, do_sample=False)
        assert again.tolist() == said.tolist()


transformers.logging.set_verbosity_error()
