"""The probe measures every rate, and what it measured can be kept and read again."""

from __future__ import annotations

import json
import math

from launch.planning.machines import OPERATIONS, between
from launch.planning.probe import probe
from tests.launch.saved_machine import from_record
from tests.ranks import run_ranks


def test_every_rate_is_measured_and_can_be_kept() -> None:
    machine = run_ranks(probe, 2, 64, 2, timeout=60)[0]
    for name in ("products", "attention", "passes", "operator", "memory", "causal_share"):
        assert 0 < getattr(machine, name) < math.inf, name
    assert set(machine.links) == set(OPERATIONS)
    for operation, link in machine.links.items():
        assert link.latency > 0, operation
        assert link.bandwidth > 0, operation
        reaches = [sent for sent, _ in link.curve]
        assert reaches == sorted(reaches), operation
    assert from_record(json.loads(json.dumps(machine.record()))) == machine
    # Twice the same lies between itself and itself.
    twice = between(machine, machine)
    assert math.isclose(twice.products, machine.products)
    assert math.isclose(twice.links["send"].seconds(1e5, 2), machine.links["send"].seconds(1e5, 2))
