"""Compiles the paged kernels for Hopper (sm_90) without a GPU: python -m experiments.benchmarks.paged_attention.compiled

A table: registers a thread, bytes a thread that did not fit them, shared memory, asynchronous copies and tensor-core
instructions in the code. Exits with 1 where a program would take more shared memory than a multiprocessor lends it.
"""

import argparse
import sys
from collections.abc import Iterator

# First: it turns the interpreter off before triton is imported.
from experiments.benchmarks.training_attention.compiled import HOPPER, SHARED_BYTES, registers  # isort: skip

import torch
import triton
from triton.compiler import ASTSource

from dms_lab.attention.kernels.paged import LEAST_PART, MAX_PARTS
from dms_lab.attention.kernels.paged_append import append_kernel
from dms_lab.attention.kernels.paged_chunk import chunk_kernel
from dms_lab.attention.kernels.paged_decode import combine_kernel, part_kernel
from dms_lab.attention.kernels.tiles import Tile, chunk_candidates, decode_candidates

WIDTHS = (64, 80, 96, 128, 256)
STORED = {"model": None, "fp8": "*fp8e4nv", "int8": "*i8"}
KERNELS = {"part": part_kernel, "combine": combine_kernel, "append": append_kernel, "chunk": chunk_kernel}
KERNELS["append_sliding"] = append_kernel  # in layers with a sliding window
INTEGERS = {"past_until", "past_order", "past_last", "past_whole", "new_until", "new_kept", "new_before"}
INTEGERS |= {"ring_slot", "position"}
LONG_INTEGERS = {"table", "lengths", "rows", "length", "seen", "tail", "freed_at", "freed", "free", "num_free"}
BYTES = {"ring_flag", "flag", "real"}
STORED_NUMBERS = {"key", "value", "key_store", "value_store"}
GROUP, PAGE, KV_HEADS = 4, 32, 8
WITHOUT_STORAGE = ("combine",)  # of float32 parts


def launches(width: int, dtype: torch.dtype, choice: int) -> Iterator[tuple[str, Tile]]:
    """Kernel and tile of every launch."""
    decoding = decode_candidates(width, dtype)[choice]
    yield "part", decoding
    yield "combine", decoding
    yield "append", Tile(KV_HEADS, 1, 1, 1)
    yield "append_sliding", Tile(KV_HEADS, 1, 1, 1)
    yield "chunk", chunk_candidates(width, dtype)[choice]


def kind(kernel: str, name: str, element: str, stored: str | None) -> str:
    """The type of an argument."""
    if name in ("key_scale", "value_scale"):
        return "*fp32" if stored else element
    for members, found in ((LONG_INTEGERS, "*i64"), (INTEGERS, "*i32"), (BYTES, "*u8")):
        if name in members:
            return found
    if name in ("inner", "outer"):
        return "fp32"
    if name in ("lse", "parts") or (kernel, name) == ("part", "output"):
        return "*fp32"
    if kernel == "append" and name in ("key", "value"):
        return element
    if kernel == "append" and name in STORED_NUMBERS and stored == STORED["fp8"]:
        return "*u8"
    if name in STORED_NUMBERS:
        return stored or element
    return element if name in ("query", "new_key", "new_value", "output", "sinks") else "i32"


def compile_for_hopper(name: str, width: int, dtype: torch.dtype, tile: Tile, storage: str):
    """The compiled kernel, of 4 query heads a group and pages of 32 slots, with the alignments that a launch finds."""
    kernel, block = KERNELS[name], triton.next_power_of_2(width)
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    constants = {"GROUP": GROUP, "PAGE": PAGE, "QUANTISED": storage != "model", "WIDE": dtype == torch.float32}
    constants |= {"WIDTH": width, "VALUE_WIDTH": width, "BLOCK_D": block, "BLOCK_V": block}
    constants |= {
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "BLOCK_G": 16,
        "BLOCK_P": PAGE if kernel is append_kernel else 16,
    }
    constants |= {"MAX_PARTS": MAX_PARTS, "LEAST_PART": LEAST_PART}
    constants |= {"HAS_ROWS": True, "HAS_FLAG": True, "HAS_REAL": True, "IS_OWN": False, "BLOCK_K": KV_HEADS}
    constants |= {"HAS_FREED": name == "append_sliding"}
    constants |= {"STORAGE": storage}
    constants |= {"HAS_FAR": True, "HAS_SINKS": False, "HAS_SOFTCAP": False}
    signature, attributes = {}, {}
    for place, parameter in enumerate(kernel.params):
        is_constant = parameter.is_constexpr
        found = "constexpr" if is_constant else kind(name.partition("_")[0], parameter.name, element, STORED[storage])
        signature[parameter.name] = found
        if found.startswith("*") or parameter.name.startswith("stride"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    constants = {key: constants[key] for key, found in signature.items() if found == "constexpr"}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=HOPPER, options=options)


def main() -> int:
    """Prints the table; the status of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=WIDTHS, help="of a head")
    parser.add_argument("--kernels", nargs="+", default=[*KERNELS], choices=KERNELS)
    parser.add_argument("--storage", nargs="+", default=[*STORED], choices=STORED)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--choice", type=int, default=0, help="which of the candidates of `kernels.tiles`")
    args = parser.parse_args()
    too_large, dtype = False, getattr(torch, args.dtype)
    print(
        "| width | kernel | storage | rows x keys, warps, stages | registers | local bytes | shared KiB | cp.async | mma |"
    )
    print("|" + "---|" * 9)
    for width in args.width:
        for name, tile in launches(width, dtype, args.choice):
            for storage in args.storage if name not in WITHOUT_STORAGE else ("model",):
                if name not in args.kernels:
                    continue
                compiled = compile_for_hopper(name, width, dtype, tile, storage)
                used, spilled = registers(compiled)
                too_large |= compiled.metadata.shared > SHARED_BYTES
                code = compiled.asm["ptx"]
                what = [storage, f"{tile.queries} x {tile.keys}, {tile.warps}, {tile.stages}"]
                if name.startswith(("combine", "append")):
                    rows = "16 parts" if name == "combine" else f"{KV_HEADS} heads"
                    what = ["" if name in WITHOUT_STORAGE else storage, f"{rows}, {tile.warps}, {tile.stages}"]
                tensor_core = "wgmma.mma_async" if "wgmma.mma_async" in code else "mma.sync"
                counts = [code.count("cp.async.c"), f"{code.count(tensor_core)} {tensor_core.partition('.')[0]}"]
                cells = [width, name, *what, used, spilled, f"{compiled.metadata.shared / 1024:.0f}", *counts]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return int(too_large)


if __name__ == "__main__":
    sys.exit(main())
