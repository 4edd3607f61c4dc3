"""Our decoder layer is a Llama layer: same weights, same output, also at scattered positions."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from adaptive import Selection, TokenLayout
from adaptive.models.decoder.layers import Attention, DecoderLayer, RMSNorm, SwiGLU


def pair() -> tuple[DecoderLayer, LlamaDecoderLayer, LlamaConfig]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    theirs = LlamaDecoderLayer(config, 0).double()
    attention = Attention(32, 4, num_kv_heads=2)
    ours = DecoderLayer(RMSNorm(32), attention, RMSNorm(32), SwiGLU(32, 48)).double()
    names = {
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn.gate": "mlp.gate_proj",
        "ffn.up": "mlp.up_proj",
        "ffn.down": "mlp.down_proj",
    }
    weights = theirs.state_dict()
    ours.load_state_dict({f"{a}.weight": weights[f"{b}.weight"] for a, b in names.items()})
    return ours, theirs, config


@pytest.mark.parametrize("positions", [list(range(7)), [0, 2, 3, 7, 11, 12, 30]])
def test_equals_a_llama_layer_at_any_positions(positions: list[int]) -> None:
    ours, theirs, config = pair()
    hidden = torch.randn(7, 32, dtype=torch.float64)
    at = torch.tensor(positions)
    tables = LlamaRotaryEmbedding(config)(hidden[None], at[None])
    expected = theirs(hidden[None], position_embeddings=tables, attention_mask=None)[0]
    layout = TokenLayout(torch.tensor([0, 7], dtype=torch.int32), 7, at)
    torch.testing.assert_close(ours(hidden, layout=layout), expected, rtol=1e-5, atol=1e-5)
    # Float32 tables on both sides; compacted positions would differ by more than a tenth.
    if positions[-1] != 6:
        compact = ours(hidden, layout=TokenLayout.dense(1, 7))
        assert (compact - expected).abs().max() > 1e-3


def test_queries_are_the_rows_of_the_full_layer() -> None:
    """One layer, fewer queries: the same rows that the full layer gives, keys from everyone."""
    ours, _, _ = pair()
    layout = TokenLayout.from_lengths([5, 4])
    hidden = torch.randn(9, 32, dtype=torch.float64)
    chosen = torch.tensor([False, True, False, False, True, False, False, False, True])
    queries = Selection.from_mask(chosen, layout)
    got = ours(hidden, layout=layout, queries=queries)
    torch.testing.assert_close(got, ours(hidden, layout=layout)[chosen])
