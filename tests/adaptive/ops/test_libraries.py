"""Optional libraries are called with the arguments they document, and only where they can serve.

None of them runs without a GPU. Each stands in here as its documented signature over plain torch:
that the numbers are right on a GPU is checked there (`launch.doctor --kernels`).
"""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch
from torch import Tensor

from adaptive.ops import library_attention
from adaptive.ops.varlen_attention import varlen_attention
from adaptive.routing.layout import TokenLayout


def install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: object) -> None:
    """A module of that name, and the packages above it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    for function, value in functions.items():
        setattr(sys.modules[name], function, value)


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, causal: bool) -> Tensor:
    lengths = starts.diff().tolist()
    layout = TokenLayout.from_lengths(lengths)
    return varlen_attention(q, k, v, queries=layout, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("library", ["flash_attn", "flash_attn_interface", "old", "new"])
def test_attention_libraries_get_boundaries_lengths_and_causality(
    library: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = TokenLayout.from_lengths([5, 3])
    q, k, v = torch.randn(8, 4, 8), torch.randn(8, 2, 8), torch.randn(8, 2, 8)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
        causal=False,
    ):  # fmt: skip
        assert softmax_scale is None  # both libraries then divide by the root of the head width
        assert max_seqlen_q == max_seqlen_k == 5
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        out = attend(q, k, v, cu_seqlens_q, causal)
        return (out, None) if library == "flash_attn_interface" else out

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        assert key.shape[1] < query.shape[1]  # shared in the kernel, without copies
        assert (max_q, max_k) == (5, 5)
        assert torch.equal(cu_seq_q, cu_seq_k)
        return attend(query, key, value, cu_seq_q, is_causal)

    def new(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1), enable_gqa=False,
    ):  # fmt: skip
        assert enable_gqa
        assert window_size in ((-1, 0), (-1, -1))
        return attend(query, key, value, cu_seq_q, window_size == (-1, 0))

    if library in ("old", "new"):
        function = old if library == "old" else new
        install(monkeypatch, "torch.nn.attention.varlen", varlen_attn=function)
        monkeypatch.setattr(
            library_attention,
            "_arguments_of_varlen_attn",
            lambda: frozenset(inspect.signature(function).parameters),
        )
        call = library_attention.torch_attention
    else:
        install(monkeypatch, library, flash_attn_varlen_func=flash_attn_varlen_func)
        call = {
            "flash_attn": library_attention.flash_attention_2,
            "flash_attn_interface": library_attention.flash_attention_3,
        }[library]
    got = call(q, k, v, layout=layout, causal=causal)
    torch.testing.assert_close(got, attend(q, k, v, layout.cu_seqlens, causal))


def test_the_installed_torch_has_an_argument_for_causality() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    known = library_attention._arguments_of_varlen_attn()
    assert {"window_size", "is_causal"} & known
    names = list(inspect.signature(varlen.varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


def test_libraries_refuse_what_they_cannot_serve() -> None:
    q = torch.zeros(4, 2, 20)
    for refuses in (library_attention.refuses_flash_2, library_attention.refuses_flash_3,
                    library_attention.refuses_torch):  # fmt: skip
        assert refuses(q) is not None
    assert "a multiple of 8" in (library_attention.refuses_heads(q) or "")
    assert "no tokens" in (library_attention.refuses_heads(torch.zeros(0, 2, 16)) or "")
