"""Matrix products of CPU ops: right whatever library computes them, counted, and chosen by rule."""

import pytest
import torch

from parallel import linear as matrix_product
from parallel.flop_formulas import torch_flop_counter
from parallel.linear import add_product, product, uses_onednn

SHAPES = [
    (0, 5, 7),
    (1, 1, 1),
    (3, 70, 5),
    (130, 129, 131),
    (16, 1024, 1025),
    (4096, 33, 65),
    (200, 64, 16),
]


@pytest.fixture(params=["onednn", "mkl"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(matrix_product, "onednn_is_faster", lambda: request.param == "onednn")
    monkeypatch.setattr(matrix_product, "_WORTH_COMPILING", 1)
    return str(request.param)


@pytest.mark.parametrize("transposed", ["neither", "left", "right", "both"])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_float64_ones(
    library: str, shape: tuple[int, int, int], transposed: str
) -> None:
    m, k, n = shape
    torch.manual_seed(0)
    a = torch.randn(k, m).t() if transposed in ("left", "both") else torch.randn(m, k)
    b = torch.randn(n, k).t() if transposed in ("right", "both") else torch.randn(k, n)
    wanted = (a.double() @ b.double()).float()
    bound = {"rtol": 1e-5, "atol": 1e-6 * k}
    torch.testing.assert_close(product(a, b), wanted, **bound)
    out = torch.full((m, n), torch.nan)
    torch.testing.assert_close(product(a, b, out=out), wanted, **bound)
    total = torch.ones(m, n)
    add_product(total, a, b)
    torch.testing.assert_close(total, 1 + wanted, **bound)


def test_flop_counters_see_every_product(library: str) -> None:
    a, b = torch.randn(30, 20), torch.randn(20, 40)
    with torch_flop_counter(display=False) as counter:
        product(a, b)
        add_product(torch.zeros(30, 40), a, b)
    assert counter.get_total_flops() == 2 * 2 * 30 * 20 * 40


def test_slices_of_wider_matrices_stay_with_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    # oneDNN multiplies by a slice of columns without vector instructions: 3 s where MKL takes 3 ms.
    monkeypatch.setattr(matrix_product, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(matrix_product, "_WORTH_COMPILING", 1)
    seen = []
    monkeypatch.setattr(matrix_product, "_onednn", lambda a, *_: seen.append(a))
    wide = torch.randn(8, 16)
    whole, slice_ = torch.randn(8, 8), wide[:, :8]
    for a, b in [(slice_, whole), (whole, slice_), (slice_.t(), whole), (whole, slice_.t())]:
        torch.testing.assert_close(product(a, b), a @ b)
    assert not seen
    product(whole, whole.t())
    assert len(seen) == 1


def test_rows_are_rounded_up_where_shapes_are_compiled(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.ones(128, 128)
    given = [0, 1, 16, 17, 128]
    wanted = [0, 16, 16, 32, 128] if library == "onednn" else given
    assert [matrix_product.rounded_rows(rows, weight) for rows in given] == wanted
    monkeypatch.setattr(matrix_product, "_WORTH_COMPILING", 128**3)
    assert matrix_product.rounded_rows(17, weight) == 17


def test_only_float32_on_a_cpu_goes_to_onednn(library: str) -> None:
    assert uses_onednn(torch.ones(1)) == (library == "onednn")
    assert not uses_onednn(torch.ones(1, dtype=torch.float64))
    assert not uses_onednn(torch.ones(1, device="meta"))
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert not uses_onednn(torch.ones(1))


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
    ],
)
def test_the_choice_follows_processor_not_clock(
    monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str, expected: bool
) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(matrix_product, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert matrix_product.onednn_is_faster.__wrapped__() is expected
