"""Machines whose figures a benchmark saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.planning.machines import Link, Machine


def from_record(record: Mapping[str, Any]) -> Machine:
    """A machine whose figures were saved."""
    links = {name: _link(link) for name, link in record["links"].items()}
    return Machine(**{**record, "links": links, "network": _link(record["network"])})


def _link(record: Mapping[str, Any]) -> Link:
    return Link(**{**record, "curve": tuple((a, b) for a, b in record["curve"])})
