"""Generate on a compact cache: ``python -m dms_lab.generate checkpoint=runs/<run>/checkpoints/cr8 prompt="..."``.

prompt=TEXT                     streams to the terminal, ends with a line of accounting
prompts=in.jsonl out=out.jsonl  a batch with a progress bar; the same command goes on where it was stopped
"""

import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig, OmegaConf

from dms_lab.train import CONFIG_PATH, command_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dms_lab.answers import AnswerFile
    from dms_lab.chains import Generated, Prompt
    from dms_lab.config import ModelConfig
    from dms_lab.generation import Engine
    from dms_lab.generation_config import GenerateConfig


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="generate")
def main(cfg: DictConfig) -> None:
    """Answers one prompt or a file of them."""
    from dms_lab.generation_config import resolve_generate

    try:
        run(resolve_generate(OmegaConf.to_container(cfg, resolve=True)))
    except ValueError as error:
        sys.exit(f"error: {error}")


def run(config: "GenerateConfig") -> None:
    """Reads what is asked, then loads what answers: a mistake in a file is told before weights are read."""
    from dms_lab import answers, models
    from dms_lab.chains import Prompt
    from dms_lab.evaluation.report import base_of
    from dms_lab.terminal import quiet
    from dms_lab.threads import set_threads

    quiet()
    set_threads(config.threads)
    model = config.model if config.model is not None else base_of(Path(config.checkpoint))
    tokenizer = models.load_tokenizer(model)
    calibration = calibration_text(config, tokenizer)
    make_engine = partial(build_engine, config, model, tokenizer, calibration)
    if config.prompt is not None:
        ids = answers.encode(config.prompt, tokenizer, config.chat)
        stream(make_engine(), [Prompt(0, ids, chain) for chain in range(config.chains)])
        return
    prompts = answers.read_prompts(Path(config.prompts), tokenizer, config.chat, config.chains)
    file = answers.AnswerFile(Path(config.out), answers.run_hash(config, model, calibration), prompts)
    batch(make_engine, prompts, file)


def calibration_text(config: "GenerateConfig", tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Documents (rows of token ids) on which `config.cr` is to be reached; none where the checkpoint stays as it is."""
    from dms_lab.evaluation.dialled import calibration_rows
    from dms_lab.evaluation.report import load_config, run_of

    if config.cr is None:
        return []
    run = run_of(Path(config.checkpoint))
    trained = load_config(run) if (run / "config.json").is_file() else None
    return calibration_rows(trained, config.calibrate, tokenizer)


def build_engine(
    config: "GenerateConfig", model: "ModelConfig", tokenizer: "PreTrainedTokenizerBase", calibration: list[list[int]]
) -> "Engine":
    """The engine of a configuration, weights loaded, its decisions dialled to `config.cr` on the documents."""
    from dms_lab import models
    from dms_lab.attachment import retrofit
    from dms_lab.calibration import dial
    from dms_lab.chains import Settings
    from dms_lab.checkpoint import load_checkpoint
    from dms_lab.generation import Engine, end_ids
    from dms_lab.policies import HEURISTICS, FullPolicy
    from dms_lab.sampling import SamplingConfig

    def those_of(schema: type):
        return schema(**{name: getattr(config, name) for name in schema.__dataclass_fields__})

    settings, sampling = those_of(Settings), those_of(SamplingConfig)
    base = models.load_base(model, models.default_device())
    if config.checkpoint is not None:
        handle = load_checkpoint(Path(config.checkpoint), base)
        if calibration:
            found = dial(handle, calibration, config.cr)
            print(f"cr={config.cr:g}: the calibration text is compressed {found.measured_cr:.2f} times", file=sys.stderr)
        policy = handle.policy()
    else:
        handle = retrofit(base, None)
        policy = FullPolicy() if config.policy == "full" else HEURISTICS[config.policy](config.budget)
    return Engine(handle, policy, settings, sampling, end_ids(base, tokenizer), tokenizer)


def stream(engine: "Engine", prompts: "list[Prompt]") -> None:
    """Prints one chain as it comes, several one after the other; exit status 1 if one could not be answered."""
    import torch
    from transformers import TextStreamer

    streamer = TextStreamer(engine.tokenizer) if len(prompts) == 1 else None
    found = []
    for answer in engine.run(prompts, streamer and (lambda prompt, ids: streamer.put(torch.tensor(ids[-1:])))):
        if streamer is not None:
            streamer.end()
        elif not answer.error:
            print(f"--- chain {answer.chain}\n{answer.text}")
        found.append(answer)
    report(engine, found)


def batch(make_engine, prompts: "list[Prompt]", file: "AnswerFile") -> None:
    """Answers what `file` does not hold yet, with a bar. Errors stand in their lines, and make the exit status 1."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    left = file.left
    if not left:
        print(f"all {len(prompts)} chains are in {file.path} already")
        return
    engine, found = make_engine(), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task("chains", total=len(prompts), completed=len(prompts) - len(left))
        for answer in engine.run(left):
            file.append(answer)
            found.append(answer)
            bar.advance(task)
    print(f"{len(prompts)} chains in {file.path}, {len(left)} of them new")
    report(engine, found)


def report(engine: "Engine", found: "list[Generated]") -> None:
    """Prints the accounting of what was answered, then a sentence for each chain that was not, and exits with 1 then."""
    answered = [answer for answer in found if not answer.error]
    if answered:
        print(summary(engine, answered))
    for answer in found:
        if answer.error:
            print(f"error: prompt {answer.problem}, chain {answer.chain}: {answer.error}", file=sys.stderr)
    if len(answered) < len(found):
        sys.exit(1)


def summary(engine: "Engine", found: "list[Generated]") -> str:
    """One line of accounting over answered chains."""
    from dms_lab import accounting

    usage = accounting.usage(answer.usage for answer in found)
    plain = engine.cache.plain_bytes_per_token
    tokens = sum(answer.usage.num_tokens for answer in found) / len(found)
    return (
        f"{len(found)} chains, {usage.tokens_generated} tokens, {engine.tokens_per_second:.1f} a second; mean of a chain: "
        f"KV reads {usage.kv_reads:.0f}, peak {usage.peak_tokens:.0f} tokens in {usage.kv_bytes_peak / 1e6:.3f} MB; "
        f"compression {usage.measured_cr:.2f} by eviction, {engine.cache.storage_factor:.2f} by storage, "
        f"{tokens * plain / usage.kv_bytes_peak:.2f} in bytes at the peak"
    )


def with_quoted_prompt(words: list[str]) -> list[str]:
    """A command line whose `prompt=` is any text: quoted for Hydra, which would read brackets and commas in it."""
    found = []
    for word in words:
        key, is_set, text = word.partition("=")
        if key == "prompt" and is_set and text not in ("null", "???"):
            text = re.sub(r"(\\*)\$\{", lambda m: 2 * m[1] + r"\${", text)
            text = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + (r"\'" if m[2] else ""), text)
            word = f"prompt='{text}'"
        found.append(word)
    return found


if __name__ == "__main__":
    from dms_lab.generation_config import generate_keys

    sys.argv = with_quoted_prompt(sys.argv)
    command_line(main, generate_keys())
