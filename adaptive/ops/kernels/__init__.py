"""Triton sources, one file an op. Imported only when a backend asks for them.

Every launch is a `torch.library` operator with a shape function, so a compiler or a fake tensor
sees one opaque op; the autograd functions around them are ordinary Python. A kernel accumulates in
float32 and rounds once, when it stores. Nothing here reads a number back to the host.

They import nothing of this repository above them: what torch must know of those that multiply is in
`adaptive.ops.operators`, their autograd functions are beside their op.
"""

NO_ACTIVATION, SWIGLU, GELU = 0, 1, 2
