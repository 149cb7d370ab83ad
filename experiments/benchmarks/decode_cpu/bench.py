"""Speed and memory of the compact cache on a CPU, one thread: python bench.py decode|memory|prefill|peak|peer [options]

decode   contestants of a contest take turns in one process: time of a step, of its attention, and bytes
memory   a fresh process a case: resident memory before and after a cache was filled
prefill  a prompt through the model; contestants take turns in one process
peak     a fresh process a case: peak resident memory of a prefill
peer     kvpress's DecodingPress in its own environment and this cache, two processes that take turns

Each measurement is appended to --out as a line of JSON; `table.py` makes tables of them.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from contest import CACHES, CR, WINDOW, Contestant, fill, held_bytes, ideal_bytes, make_cache, make_models

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
KVPRESS = ROOT / "experiments/peers/kvpress"
WORK = ROOT / "runs/decode_cpu"
CONTESTS = ("full,dms,unequal", "hf,dms", "dms,fp8,int8")
PREFILLS = (
    "hf",
    "hf/256",
    "dms",
    "dms/256",
    "full",
    "full/256",
    "window",
    "window/256",
)  # /256: forwards of 256 tokens each


def decode(args: argparse.Namespace) -> None:
    """Every contest at every length and batch: fill, two steps to warm up, then rounds in turns."""
    models = make_models(args.dtype)
    for num_tokens in args.tokens:
        for batch in args.batch:
            for contest in args.contest:
                rivals = [Contestant(name, models, num_tokens, batch) for name in contest.split(",")]
                _compete(rivals, args)
                for rival in rivals:
                    times = {"step_ms": _rounded(rival.step_ms), "attend_ms": _rounded(rival.attend_ms)}
                    case = {"contest": contest, "name": rival.name, "tokens": num_tokens, "batch": batch}
                    _note(args, "decode", case | rival.bytes | times)
                del rivals, rival
                gc.collect()


def _compete(rivals: list[Contestant], args: argparse.Namespace) -> None:
    for rival in rivals:
        rival.step(), rival.step()
        rival.forget()
    for _ in range(args.rounds):
        for rival in rivals:
            for _ in range(args.steps):
                rival.step()


def prefill(args: argparse.Namespace) -> None:
    """The same random prompt through the model by every way of `--ways` in turns, `--rounds` times."""
    models = make_models(args.dtype)
    for num_tokens in args.tokens:
        seconds: dict[str, list[float]] = {way: [] for way in args.ways}
        for way in args.ways * args.rounds:
            seconds[way].append(_prefill(models, way, num_tokens)[0])
        for way, found in seconds.items():
            _note(args, "prefill", {"name": way, "tokens": num_tokens, "batch": 1, "seconds": _rounded(found)})


@torch.no_grad()
def _prefill(models, way: str, num_tokens: int) -> tuple[float, int]:
    """Seconds of a prompt of one sequence, and the bytes that its cache then holds."""
    name, _, size = way.partition("/")
    cache, model = make_cache(name), models.of(name)
    ids = torch.randint(model.config.vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(2))
    started = time.perf_counter()
    for piece in ids.split(int(size or num_tokens), 1):
        model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - started, held_bytes(cache)


# -- memory: a process a case ------------------------------------------------------------------------------------------
def memory(args: argparse.Namespace) -> None:
    """Resident memory of each cache in a process of its own."""
    for num_tokens in args.tokens:
        for batch in args.batch:
            for name in args.names:
                found = _child("fill", name, num_tokens, batch, args)
                _note(args, "memory", {"name": name, "tokens": num_tokens, "batch": batch} | found)


def peak(args: argparse.Namespace) -> None:
    """Peak resident memory of each way to prefill in a process of its own."""
    for num_tokens in args.tokens:
        for way in args.ways:
            found = _child("prefill", way, num_tokens, 1, args)
            _note(args, "peak", {"name": way, "tokens": num_tokens, "batch": 1} | found)


def _child(what: str, name: str, num_tokens: int, batch: int, args: argparse.Namespace) -> dict:
    words = [sys.executable, __file__, "child", what, name, str(num_tokens), str(batch), "--dtype", args.dtype_name]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(args: argparse.Namespace) -> None:
    """One case, printed as JSON: called by the other commands."""
    what, name, num_tokens, batch = args.case[0], args.case[1], int(args.case[2]), int(args.case[3])
    {"fill": _fill_case, "prefill": _prefill_case, "generate": _generate_case}[what](name, num_tokens, batch, args.dtype)


def _fill_case(name: str, num_tokens: int, batch: int, dtype: torch.dtype) -> None:
    fill(make_cache(name), WINDOW, 1, dtype)  # what torch loads at its first call is there before
    _trim()
    before = _status("RssAnon")
    cache = make_cache(name)
    fill(cache, num_tokens, batch, dtype)
    found = {
        "held_bytes": held_bytes(cache),
        "ideal_bytes": ideal_bytes(cache, dtype),
        "grown_bytes": _status("RssAnon") - before,
    }
    _trim()
    print(json.dumps(found | {"trimmed_bytes": _status("RssAnon") - before}))


def _prefill_case(way: str, num_tokens: int, batch: int, dtype: torch.dtype) -> None:
    models = make_models(dtype)
    _prefill(models, way, WINDOW)
    _trim()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    seconds, held = _prefill(models, way, num_tokens)
    print(json.dumps({"peak_bytes": _status("VmHWM") - before, "held_bytes": held, "seconds": round(seconds, 2)}))


def _trim() -> None:
    """Gives back to the system what was freed, but kept by malloc for the next allocation."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(name: str) -> int:
    """Bytes of a figure that the kernel has of this process: RssAnon without shared files, VmRSS and its peak VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name + ":")))


# -- kvpress -----------------------------------------------------------------------------------------------------------
def peer(args: argparse.Namespace) -> None:
    """Greedy tokens of one sequence by kvpress and by this cache at the same budget, in turns; prefill not counted."""
    WORK.mkdir(parents=True, exist_ok=True)
    make_models(args.dtype).original.save_pretrained(WORK / "model")
    for num_tokens in args.tokens:
        ids = torch.randint(21000, (num_tokens,), generator=torch.Generator().manual_seed(2)).tolist()
        (WORK / "prompt.jsonl").write_text(json.dumps({"ids": ids}) + "\n")
        budget = (num_tokens - WINDOW) // CR + WINDOW
        found: dict[str, list[dict]] = {"kvpress": [], "dms": [], "hf": []}
        for _ in range(args.rounds):
            found["kvpress"].append(_kvpress(budget, args))
            for name in ("dms", "hf"):
                found[name].append(_child("generate", name, num_tokens, args.new_tokens, args))
        for name, runs in found.items():
            case = {"name": name, "tokens": num_tokens, "batch": 1, "budget": budget, "new_tokens": args.new_tokens}
            _note(args, "peer", case | {"runs": runs})


def _kvpress(budget: int, args: argparse.Namespace) -> dict:
    words = [KVPRESS / ".venv/bin/python", KVPRESS / "run.py", "--model", WORK / "model"]
    words += ["--prompts", WORK / "prompt.jsonl", "--press", "KnormPress", "--decoding", "--prefill"]
    words += ["--budget", budget, "--max-new-tokens", args.new_tokens, "--ignore-eos", "--repeat", 1]
    words = [str(word) for word in [*words, "--dtype", args.dtype_name]]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {k: found[k] for k in ("method", "prefill_seconds", "tokens_per_second", "kv_bytes_peak", "measured_cr")}


@torch.no_grad()
def _generate_case(name: str, num_tokens: int, new_tokens: int, dtype: torch.dtype) -> None:
    model, cache = make_models(dtype).of(name), make_cache(name)
    ids = torch.tensor([json.loads((WORK / "prompt.jsonl").read_text())["ids"]])
    times = [time.perf_counter()]
    for _ in range(new_tokens):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        times.append(time.perf_counter())
    speed = (new_tokens - 1) / (times[-1] - times[1])
    found = {"prefill_seconds": times[1] - times[0], "tokens_per_second": speed, "held_bytes": held_bytes(cache)}
    print(json.dumps(found))


# -- notes -------------------------------------------------------------------------------------------------------------
def _rounded(values: list[float]) -> list[float]:
    return [round(x, 3) for x in values]


def _note(args: argparse.Namespace, kind: str, found: dict) -> None:
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    row = {"kind": kind, "dtype": args.dtype_name} | found | {"revision": revision, "torch": torch.__version__}
    with args.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps({k: v for k, v in row.items() if k not in ("step_ms", "attend_ms")}), file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=("decode", "memory", "prefill", "peak", "peer", "child"))
    add("case", nargs="*", help="of a child process alone")
    add("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    add("--batch", type=int, nargs="+", default=[1, 8])
    add("--contest", nargs="+", default=CONTESTS, help=f"names that take turns, of {', '.join(CACHES)}")
    add("--names", nargs="+", default=CACHES[:-1], help="caches whose resident memory is measured")
    add("--ways", nargs="+", default=["hf", "dms", "dms/256"], help=f"of {', '.join(PREFILLS)}")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=4, help="decode steps of a contestant's turn")
    add("--new-tokens", type=int, default=65)
    add("--dtype", dest="dtype_name", default="float32", choices=("float32", "bfloat16"))
    add("--out", type=Path, default=HERE / "measured.jsonl")
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype_name)
    return args


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = parse()
    globals()[options.command](options)
