"""Compiles the kernels for Hopper (sm_90) by Triton's own compiler, without a GPU: python compiled.py [--width 64 128 ...]

A table: registers a thread, bytes a thread that did not fit them, shared memory, tensor-core instructions in the code.
Exits with 1 where a program would take more shared memory than a multiprocessor lends it.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dms_lab.attention.kernels.delta import delta_kernel
from dms_lab.attention.kernels.forward import forward_kernel
from dms_lab.attention.kernels.key_grad import key_grad_kernel
from dms_lab.attention.kernels.query_grad import query_grad_kernel
from dms_lab.attention.kernels.tiles import Tile, candidates

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 * 1024
WIDTHS = (64, 80, 96, 128, 256)
KERNELS = ("forward", "query_grad", "key_grad_far", "key_grad_near", "delta")
INTEGERS = {"far_position", "far_count", "documents", "seen_from", "seen_until", "run_start", "run_end"}
FLOATS = {"far_bias", "lse", "delta", "bias_grad", "far_key_grad", "far_value_grad"}
COUNTS = {"num_heads", "num_kv_heads", "num_tokens", "window", "sliding"}


def launches(width: int, dtype: torch.dtype, choice: int) -> Iterator[tuple[str, triton.JITFunction, Tile, dict, set[str]]]:
    """Name, kernel, tile, flags and float32 gradients of every launch of a training step."""
    tiles = candidates(width, dtype)[choice]
    yield "forward", forward_kernel, tiles.forward, {"HAS_SINKS": False}, set()
    yield "query_grad", query_grad_kernel, tiles.query_grad, {}, set()
    yield "key_grad_far", key_grad_kernel, tiles.key_grad, {"FAR": True}, {"key_grad", "value_grad"}
    yield "key_grad_near", key_grad_kernel, tiles.key_grad, {"FAR": False}, set()
    yield "delta", delta_kernel, Tile(64, 16), {}, set()


def compile_for(
    target: GPUTarget, kernel: triton.JITFunction, width: int, dtype: torch.dtype, tile: Tile, flags: dict, wide: set
):
    """The compiled kernel, of packed documents and 4 query heads a group, with the alignments that a launch finds."""
    constants = {"WIDTH": width, "BLOCK_D": triton.next_power_of_2(width), "BLOCK_M": tile.queries, "BLOCK_N": tile.keys}
    constants |= {"GROUP": 4, "HAS_FAR": True, "HAS_DOCUMENTS": True, "HAS_SOFTCAP": False}
    constants |= {"WIDE": dtype == torch.float32} | flags
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    signature, attributes = {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
        elif name in COUNTS or name.startswith("stride"):
            signature[name] = "i32"
        elif name in ("inner", "outer", "scaling"):
            signature[name] = "fp32"
        else:
            signature[name] = "*i32" if name in INTEGERS else "*fp32" if name in FLOATS | wide else element
        if signature[name].startswith("*") or name.startswith("stride"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    constants = {name: constants[name] for name, kind in signature.items() if kind == "constexpr"}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def registers(compiled) -> tuple[int, int]:
    """Registers of a thread, and its bytes of local memory, by NVIDIA's cuobjdump, which comes with Triton."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([program, "-res-usage", file.name], check=True, capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    return int(found[1]), int(found[2])


def main() -> int:
    """Prints the table; the status of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=WIDTHS, help="of a head")
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--choice", type=int, default=0, help="which of the candidates of `kernels.tiles`")
    args = parser.parse_args()
    too_large = False
    print("| head width | kernel | queries x keys, warps, stages | registers | local bytes | shared KiB | wgmma |")
    print("|---|---|---|---|---|---|---|")
    dtype = getattr(torch, args.dtype)
    for width in args.width:
        for name, kernel, tile, flags, wide in launches(width, dtype, args.choice):
            if name not in args.kernels:
                continue
            compiled = compile_for(HOPPER, kernel, width, dtype, tile, flags, wide)
            used, spilled = registers(compiled)
            shared = compiled.metadata.shared
            too_large |= shared > SHARED_BYTES
            block = f"{tile.queries} x {tile.keys}, {tile.warps}, {tile.stages}"
            cells = [
                width,
                name,
                block,
                used,
                spilled,
                f"{shared / 1024:.0f}",
                compiled.asm["ptx"].count("wgmma.mma_async"),
            ]
            print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)
    return int(too_large)


if __name__ == "__main__":
    sys.exit(main())
