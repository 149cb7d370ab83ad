"""Runs one press of kvpress on prompts: python run.py --model FOLDER --prompts prompts.jsonl --press NAME --cr 4

A line of the prompts file is {"ids": [...]} with, where answers are to be judged, "task", "answer" and "after" (the mark
that the answer stands behind); `prompts.py` writes such files. Results are appended to --out, a line a task, in dms_lab's
format; the last line on standard output is one JSON object of times and costs. See README.md beside this file.
"""

import argparse
import json
import logging
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import lines


@dataclass(frozen=True)
class Prompt:
    """One request: token ids, the answer and the mark before it if it can be judged, the length that it was made at."""

    ids: list[int]
    task: str = "prompts"
    answer: str | None = None
    after: str | None = None
    length: int | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSONL file; raises `ValueError` for a line without token ids, and for an empty file."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        row = json.loads(line)
        if not row.get("ids"):
            raise ValueError(f'{path}:{number} has no token ids: a prompt is {{"ids": [token, ...]}} with at least one')
        found.append(Prompt(**{key: row[key] for key in ("ids", "task", "answer", "after", "length") if key in row}))
    if not found:
        raise ValueError(f"{path} has no prompts: write some with prompts.py")
    return found


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--list", action="store_true", help="print the names of all presses and stop")
    add("--model", type=Path, help="folder of a model")
    add("--prompts", type=Path, help="JSONL file of prompts")
    add("--press", default="none", help="class name of a press, or none")
    add("--inner", nargs="+", default=[], help="what the press wraps")
    add("--cr", type=float, help="full / kept, so 4 keeps a quarter (kvpress calls that a ratio of 0.75)")
    add("--budget", type=int, help="tokens to keep, instead of --cr; with both, --cr is a label")
    add("--decoding", action="store_true", help="put the press into DecodingPress")
    add("--prefill", action="store_true", help="with --decoding: shrink the prompt as well")
    add("--interval", type=int, default=16, help="decode steps from one compression to the next")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE", help="further arguments of the press, values in JSON")
    add("--max-new-tokens", type=int, default=96)
    add("--ignore-eos", action="store_true", help="always generate --max-new-tokens")
    add("--out", type=Path, help="JSONL file to append results to")
    add("--name", help="the model's name in results; its folder's by default")
    add("--seed", type=int, default=0, help="seed of random presses, and the seed in results")
    add("--repeat", type=int, default=0, help="time as many further passes, without the meter, and print the medians")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--attention", default="sdpa", choices=("sdpa", "eager"))
    add("--device", default="cpu")
    return parser.parse_args(words)


def settings_of(pairs: list[str]) -> tuple[tuple[str, object], ...]:
    """NAME=VALUE pairs, with values read as JSON where they are, else as text."""
    found = []
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair} has no value; write NAME=VALUE")
        try:
            found.append((name, json.loads(text)))
        except json.JSONDecodeError:
            found.append((name, text))
    return tuple(found)


def main(words: list[str] | None = None) -> None:
    """Answers every prompt once with the meter, `--repeat` times without it; writes and prints what came out."""
    args = parse(words)
    import presses

    if args.list:
        print("\n".join(presses.names()))
        return
    for name in ("model", "prompts"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing; run.py --help lists every argument")
    if args.cr is not None and args.cr < 1:
        raise ValueError(f"--cr {args.cr:g} is below 1; it is full / kept, so 4 keeps a quarter")
    names = ("press", "inner", "cr", "budget", "decoding", "prefill", "interval")
    spec = presses.Spec(
        **{n: getattr(args, n) for n in names} | {"inner": tuple(args.inner)}, settings=settings_of(args.set)
    )
    prompts = read_prompts(args.prompts)
    presses.build(spec, len(prompts[0].ids), args.max_new_tokens)  # what cannot be built is refused before a model is read
    model = load(args)
    check_lengths(model, prompts, args.max_new_tokens)
    answers, metered = measure(model, spec, prompts, args)
    passes = [time_pass(model, spec, prompts, args) for _ in range(args.repeat)] or [metered]
    values = asdict(spec) | {
        n: str(getattr(args, n)) for n in ("max_new_tokens", "ignore_eos", "dtype", "attention", "seed")
    }
    target = 1.0 if spec.press == presses.NONE else spec.cr
    name = args.name or args.model.resolve().name
    label = lines.Label(name, spec.method, target, args.seed, lines.config_hash(values), asked(prompts, args.budget))
    rows = lines.result_lines(label, answers)
    if args.out:
        lines.append(args.out, rows)
    for row in rows:
        print(describe(row), file=sys.stderr)
    print(json.dumps(summary(spec.method, answers, passes, args)))


def asked(prompts: list[Prompt], budget: int | None) -> dict:
    """What decided the answers beside the press and its ratio, by the names of dms_lab's results."""
    lengths = {prompt.length for prompt in prompts}
    found = {"length": lengths.pop() if len(lengths) == 1 else None, "live_tokens": budget}
    return {name: value for name, value in found.items() if value is not None}


def load(args: argparse.Namespace):
    """The model in evaluation mode; the configuration of transformers 5 is read as it stands."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    torch.manual_seed(args.seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation=args.attention
    )
    return model.to(args.device).eval()


def check_lengths(model, prompts: list[Prompt], max_new_tokens: int) -> None:
    """Raises `ValueError` for a prompt that, with what may be generated, exceeds the model's positions."""
    limit = model.config.get_text_config().max_position_embeddings
    for index, prompt in enumerate(prompts):
        if len(prompt.ids) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {index} has {len(prompt.ids)} tokens; with --max-new-tokens {max_new_tokens} it exceeds the "
                f"model's {limit} positions: shorten it or lower --max-new-tokens"
            )


def measure(model, spec, prompts: list[Prompt], args: argparse.Namespace) -> tuple[list[lines.Answered], tuple]:
    """Every prompt answered and accounted for, and the seconds that this pass took (prefill, decode)."""
    from decoding import Meter

    judge = make_judge(args.model) if any(p.answer is not None for p in prompts) else None
    answers, prefill, decode = [], 0.0, 0.0
    for prompt in prompts:
        meter = Meter(model)
        found = _generate(model, spec, prompt, args, meter)
        held, live = meter.counts()
        right = judge(found, prompt) if judge and prompt.answer is not None else None
        seconds = found.prefill_seconds + found.decode_seconds
        costs = (len(prompt.ids) + len(found.ids) - 1, len(found.ids), held, live, meter.cache.peak_bytes, seconds)
        answers.append(lines.Answered(prompt.task, right, *costs))
        prefill, decode = prefill + found.prefill_seconds, decode + found.decode_seconds
    return answers, (prefill, decode)


def time_pass(model, spec, prompts: list[Prompt], args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of one pass over all prompts without the meter: prefill, decode."""
    found = [_generate(model, spec, prompt, args) for prompt in prompts]
    return sum(g.prefill_seconds for g in found), sum(g.decode_seconds for g in found)


def _generate(model, spec, prompt: Prompt, args: argparse.Namespace, meter=None):
    from decoding import generate
    from presses import build

    press = build(spec, len(prompt.ids), args.max_new_tokens)
    return generate(model, press, prompt.ids, args.max_new_tokens, end_ids(model, args), meter)


def end_ids(model, args: argparse.Namespace) -> tuple[int, ...]:
    """The tokens that end an answer; none with --ignore-eos."""
    found = model.generation_config.eos_token_id
    if args.ignore_eos or found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (found,)


def make_judge(folder: Path):
    """A function that says whether a generation is its prompt's answer; it needs the tokenizer beside the model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def judge(found, prompt: Prompt) -> bool:
        text = tokenizer.decode(found.ids, skip_special_tokens=False)
        return lines.is_right(text, found.finished, prompt.answer, prompt.after, tokenizer.eos_token)

    return judge


def summary(method: str, answers: list[lines.Answered], passes: list[tuple], args: argparse.Namespace) -> dict:
    """Times and costs of all prompts together. A prefill gives each prompt's first token, so decode steps are the rest."""
    costs = lines.usage(answers)
    prefill, decode = (statistics.median(seconds) for seconds in zip(*passes, strict=True))
    steps = costs["tokens_generated"] - len(answers)
    return {
        "method": method,
        "num_prompts": len(answers),
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "decode_steps": steps,
        "tokens_per_second": steps / decode if steps else None,
        "passes_timed": args.repeat,
        **costs,
    }


def describe(row: dict) -> str:
    """One line for people."""
    share = "not judged" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f} % right"
    return (
        f"{row['method']} {row['task']}: {share} of {row['num_problems']}, CR {row['measured_cr']:.2f} held and "
        f"{row['live_measured_cr']:.2f} live, {row['kv_reads']:.0f} KV reads, peak {row['peak_tokens']:.0f} tokens and "
        f"{row['kv_bytes_peak']:.0f} bytes"
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
