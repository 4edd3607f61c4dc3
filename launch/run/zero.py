"""Which ZeRO stages DeepSpeed supports beside which axes of a mesh."""

from __future__ import annotations

from launch.run.errors import BadInput


def check_zero(stage: int, *, tensor: int = 1, expert: int = 1) -> None:
    """Refuse what DeepSpeed cannot do, before anything is built.

    Raises:
        BadInput: ZeRO 3 beside tensor or expert parallelism; no such stage.
    """
    if stage not in (0, 1, 2, 3):
        raise BadInput(f"deepspeed.zero_optimization.stage={stage}: must be 0, 1, 2 or 3")
    for axis, degree in (("tensor", tensor), ("expert", expert)):
        if stage == 3 and degree > 1:
            raise BadInput(
                f"parallel.{axis}={degree}: must be 1 with ZeRO 3, whose shards of every weight "
                "lie over all data ranks; use ZeRO 0, 1 or 2"
            )
