"""The embedded tokenizer: byte-level BPE of 1,024 entries, so any text survives a round trip.

Every word of the generated tasks is one token, and each decimal digit is one; what is left of the vocabulary goes to
Python source code. The chat template opens an assistant turn inside its thought: ``<|im_start|>assistant\\n<think>``.
"""

import random
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dms_lab.tiny import tasks

VOCABULARY_SIZE = 1024
PAD, BEGIN, TURN, END = "<|pad|>", "<|begin|>", "<|im_start|>", "<|im_end|>"
THINK, END_THINK = "<think>", "</think>"

# An assistant turn keeps its thought when it holds one; the generation prompt opens the thought.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>' -}}{%- endif -%}"
)


def train_tokenizer(code: Iterable[str], seed: int = 0) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the words of `tasks` and on the given source texts; equal input gives equal output."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tasks.PIECE.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, BEGIN, TURN, END, THINK, END_THINK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(code, random.Random(seed)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=[TURN, THINK, END_THINK],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _training_texts(code: Iterable[str], rng: random.Random) -> Iterable[str]:
    """Source code, then the task words often enough that each becomes one token before the vocabulary is full."""
    size = 0
    for text in code:
        size += len(text)
        yield text
    vocabulary = [*tasks.words(), "\n", "user", "assistant", "system"]
    for _ in range(max(200, size // 400)):
        rng.shuffle(vocabulary)
        yield "".join(vocabulary)
