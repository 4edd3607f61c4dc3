"""Ranks of one node meet where no other machine reaches them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from launch.run.ranks import free_port

_RANK = """
import json, psutil, torch, torch.distributed as dist
from launch.run.ranks import join_ranks
join_ranks()
total = torch.ones(3)
dist.all_reduce(total)
listening = [
    one.laddr.ip
    for one in psutil.Process().net_connections("inet")
    if one.status == psutil.CONN_LISTEN
]
dist.barrier()
print(json.dumps([total.tolist(), listening]), flush=True)
dist.destroy_process_group()
"""


def test_ranks_of_one_node_listen_on_loopback_only() -> None:
    common = dict(os.environ, WORLD_SIZE="2", LOCAL_SIZE="2", OMP_NUM_THREADS="1")
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[0].splitlines()[-1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for total, listening in map(json.loads, said):
        assert total == [2.0, 2.0, 2.0]
        assert set(listening) == {"127.0.0.1"}
