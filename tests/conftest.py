"""Without a GPU, Triton kernels run interpreted: Triton must know before it is first imported.

What takes long depends on the machine: programs called in this process do not tell of it.
"""

import os

import torch

from launch.run import terminal

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
terminal.PATIENCE = 3600.0
