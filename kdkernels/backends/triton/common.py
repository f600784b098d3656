"""What every family's Triton kernels ask of Triton itself."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _kernel():
    return


# The interpreter wraps kernels in a class of its own.
INTERPRETED = not isinstance(_kernel, triton.runtime.JITFunction)
IN_PYTHON = tl.constexpr(INTERPRETED)
