"""Compiles the kernels of a GPU for generations of them, without having one, and says what bytes on the chip each takes.

python -m tests.compiled 80 90
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tasks.jobs import gpu_kernels
from tasks.jobs.attention import PAGE
from tasks.jobs.gpu_kernels import FEWEST_ROWS, PIECE

NUMBERS = {"scaling": "fp32", "softcap": "fp32", "epsilon": "fp32"}  # others are int32
POINTERS = {
    "i32": {"tables", "positions", "pieces"},
    "fp32": {"stream", "cosines", "sines"},
    "bf16": {"key", "value", "keys", "values", "query", "found", "qkv", "change", "weight", "normed", "both", "gated"},
}


def compiled(kernel: Any, generation: int, **constants: Any) -> int:
    """Bytes on the chip of a kernel with these constants, for tensors that are aligned, as torch's are."""
    kinds = {name: f"*{kind}" for kind, names in POINTERS.items() for name in names}
    signature = {
        name: "constexpr" if name in constants else kinds.get(name) or NUMBERS.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(signature) if name in kinds}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, GPUTarget("cuda", generation, 32), {"num_stages": 2}).metadata.shared


def on_chip(generation: int) -> dict[str, int]:
    """Of each kernel, as for Llama 3 in bf16."""
    one = {"GROUP": 4, "KV_HEADS": 8, "SIZE": 128, "BLOCK": 128, "PAGE": PAGE}
    attend = {**one, "SOFTCAP": True, "PRECISION": "tf32x3"}
    each = {name: one[name] for name in ("KV_HEADS", "SIZE", "BLOCK", "PAGE")}
    return {
        "store": compiled(gpu_kernels._store, generation, **each),
        "rotate": compiled(gpu_kernels._rotate, generation, HALF=64, BLOCK=64),
        "add_norm": compiled(gpu_kernels._add_norm, generation, SIZE=4096, BLOCK=4096),
        "gate": compiled(gpu_kernels._gate, generation, SIZE=14_336, BLOCK=1024),
        "a piece": compiled(gpu_kernels._attend, generation, HEADS=4, ROWS=4 * PIECE, **attend),
        "alone": compiled(gpu_kernels._attend, generation, HEADS=4, ROWS=FEWEST_ROWS, **attend),
    }


if __name__ == "__main__":
    print(json.dumps({generation: on_chip(int(generation)) for generation in sys.argv[1:]}))
