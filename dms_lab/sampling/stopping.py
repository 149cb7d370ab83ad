"""When a chain is done: its tokens -> the text that each completes -> end token, stop id, stop string?"""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from dms_lab.sampling.config import UNFINISHED, SamplingConfig, is_int


def id_set(eos_ids: Iterable[int]) -> frozenset[int]:
    ids = tuple(eos_ids) if isinstance(eos_ids, Iterable) else (None,)
    if not all(map(is_int, ids)):
        raise ValueError(f"eos_ids={eos_ids!r} is not a collection of token ids; give whole numbers, e.g. (3,)")
    return frozenset(ids)


class _Decoder:
    """Hands out the text of a growing list of ids, token by token, by decoding only a window of the last few.

    Decoding a token alone is wrong where decoders drop a leading space, join word pieces or need more bytes: the window
    begins at least `CONTEXT` tokens back (or at the first token), at the end of a character where the bytes make sense
    at all. Handed out is what the window has grown by, less a character that is not there in full.
    """

    CONTEXT = 8

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._start = self._boundary = self._num_given = 0  # the window begins at `start`, the next one at `boundary`

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` as it is: special tokens included, spaces not tidied."""
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def push(self, ids: Sequence[int], n: int) -> str:
        """The characters that `ids[n - 1]` completes. To be called for n = 1, 2, ..."""
        window = self.decode(ids[self._start : n])
        whole = window.rstrip(UNFINISHED)
        new, self._num_given = whole[self._num_given :], max(self._num_given, len(whole))
        age = n - self._boundary
        if age >= 2 * self.CONTEXT or (age >= self.CONTEXT and whole == window):
            self._start, self._boundary = self._boundary, n
            self._num_given = len(self.decode(ids[self._start : n]).rstrip(UNFINISHED))
        return new


class StopRule:
    """When one chain ends: at an end token, a stop id or a stop string, the latter two only after `stop_after`.

    A function of the generated ids alone: a fresh rule given all of them at once is in the state of one that saw them come
    one at a time. Decoding costs a bounded number of tokens a step. A stop string counts if it begins after the end of
    the first `stop_after`, a stop id if it comes after the token that completes it. Raises `ValueError` if there are
    texts to look for and no tokenizer.

    Limit: the text is that of the generated ids without the prompt, so with a tokenizer that drops the leading space of a
    text (Llama 2) a stop string does not match a space at the very beginning.
    """

    def __init__(
        self, config: SamplingConfig, eos_ids: Iterable[int], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self._reads_text = bool(config.stop) or (config.stop_after is not None and bool(config.stop_ids))
        if self._reads_text and tokenizer is None:
            raise ValueError(
                f"stop={config.stop!r} with stop_after={config.stop_after!r} needs the text of the tokens, but no "
                "tokenizer was given; give the model's tokenizer, or stop at stop_ids without stop_after"
            )
        self._config = config
        self._eos_ids = id_set(eos_ids)
        self._decoder = _Decoder(tokenizer) if tokenizer is not None else None
        self._longest = max(map(len, config.stop), default=0)
        self._holds = config.stop_after is None
        self._tail = ""  # the end of the text read so far in which what is looked for may have begun
        self._num_seen = 0
        self._verdict: tuple[str, int] | None = None
        self._at_string = False

    def check(self, generated_ids: Sequence[int]) -> tuple[str, int] | None:
        """Why and with how many generated ids the chain ends, `("eos" | "stop", n)`, or None while it goes on.

        To be called with all ids generated so far; ids that were not there at the last call are taken in one by one. The
        ids end with the token that ends the chain: the end token, the stop id, or the one that completes a stop string
        (`text` cuts that). An end token comes first where several hold. The answer does not change once given.
        """
        if len(generated_ids) < self._num_seen:
            raise ValueError(
                f"the rule has seen {self._num_seen} ids and is given {len(generated_ids)}; ids are only ever added: make "
                "a fresh rule for another chain"
            )
        while self._verdict is None and self._num_seen < len(generated_ids):
            self._num_seen += 1
            reason = self._reason(generated_ids, self._num_seen)
            self._verdict = (reason, self._num_seen) if reason else None
        return self._verdict

    def text(self, generated_ids: Sequence[int]) -> str:
        """The text of the ids, special and end tokens included, cut before the stop string if one ended the chain.

        Of several stop strings completed by the same token, the one that begins first. Takes `generated_ids` in as `check`.
        """
        if self._decoder is None:
            raise ValueError("the rule has no tokenizer and cannot decode; give one when making the rule")
        self.check(generated_ids)
        text = self._decoder.decode(generated_ids)
        if not self._at_string:
            return text
        after = self._config.stop_after or ""
        begin = text.find(after) + len(after)
        found = [text.find(stop, begin) for stop in self._config.stop]
        return text[: min((at for at in found if at >= 0), default=len(text))]

    def _reason(self, ids: Sequence[int], n: int) -> str | None:
        """Why the chain ends with `ids[:n]`, given that it did not end before."""
        if ids[n - 1] in self._eos_ids:
            return "eos"
        if self._holds and ids[n - 1] in self._config.stop_ids:
            return "stop"
        if self._reads_text:
            self._at_string = self._read(self._decoder.push(ids, n))
        return "stop" if self._at_string else None

    def _read(self, new: str) -> bool:
        """Takes in new text; returns whether a stop string is complete."""
        self._tail += new
        if not self._holds:
            _, marker, after = self._tail.partition(self._config.stop_after)
            if not marker:
                self._tail = _last(self._tail, len(self._config.stop_after) - 1)
                return False
            self._holds, self._tail = True, after
        if any(stop in self._tail for stop in self._config.stop):
            return True
        self._tail = _last(self._tail, self._longest - 1)
        return False


def _last(text: str, n: int) -> str:
    return text[max(0, len(text) - n) :]
