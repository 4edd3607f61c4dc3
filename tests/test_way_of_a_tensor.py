"""How much of the repository a reader of one routed layer turns through (issue 15, point 7)."""

import os

import pytest

from tests.way_of_a_tensor import routed_layer, way_of


@pytest.mark.skipif("ADAPTIVE_BACKEND" in os.environ, reason="another way is forced")
def test_one_rank_reads_few_files_and_nothing_of_the_mesh() -> None:
    forward = routed_layer()
    forward()
    way = way_of(forward)
    assert len(way.files) <= 19, way.files
    assert way.changes <= 70, way.changes
    of_ranks = {"tensor", "rows", "context", "mesh", "gradients", "expert", "megatron"}
    assert not {f"parallel/{name}.py" for name in of_ranks} & set(way.files)
