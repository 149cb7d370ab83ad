"""Count first: the least that each kernel and each whole step computes and moves, by the sizes of the model.

    Shape, batch, tokens -> Work(flops, bytes) of one layer's kernel -> sums of a step -> floors on a machine's ceilings

A multiplication and an addition are two operations. Bytes: every input read once, every output written once, nothing kept
in a cache between kernels. Exponentials, norms and the like are left out of the operations: they are no matrix products.
Causal attention has T (T + 1) / 2 pairs a head; what a kernel does beyond them is its own loss.
"""

from dataclasses import dataclass

FLOAT = 4  # bytes of what is kept in float32: log-sum-exp, decisions and their gradients


@dataclass(frozen=True)
class Work:
    """Operations and bytes."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.bytes * times)

    def floors(self, ceilings: "Ceilings") -> tuple[float, float]:
        """Seconds that the operations take at least, and the bytes."""
        return self.flops / ceilings.flops, self.bytes / ceilings.bandwidth


@dataclass(frozen=True)
class Ceilings:
    """What a machine was measured at: operations a second of a large matrix product, bytes a second of a large copy."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Shape:
    """The sizes of a dense decoder with gated MLPs."""

    num_layers: int
    hidden: int
    mlp: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of one layer: queries and outputs, keys and values, the MLP's three."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.hidden * (2 * query + 2 * kv + 3 * self.mlp)


# From the models' own config.json.
SHAPES = {
    "Llama-3.2-1B": Shape(16, 2048, 8192, 32, 8, 64, 128256),
    "Qwen-R1-7B": Shape(28, 3584, 18944, 28, 4, 128, 152064),
    "Qwen3-8B": Shape(36, 4096, 12288, 32, 8, 128, 151936),
}
TINY = Shape(2, 32, 64, 2, 1, 16, 128)  # for what has to run, whatever it takes
H100 = Ceilings(989e12, 3.35e12)  # an H100 SXM5 in dense bfloat16 by its data sheet, which no kernel reaches


# -- attention of one layer ----------------------------------------------------------------------------------------------
def attention_forward(
    shape: Shape, batch: int, num_tokens: int, itemsize: int, relaxed: bool = True, pairs: float | None = None
) -> Work:
    """Causal attention of T tokens, `pairs` a head if not all; `relaxed`: with a bias a key, as in training."""
    pairs = batch * shape.num_heads * (num_tokens * (num_tokens + 1) / 2 if pairs is None else pairs)
    return Work(2 * 2 * shape.head_dim * pairs, _tensors(shape, batch, num_tokens, itemsize, 2, 2, relaxed))


def attention_backward(
    shape: Shape,
    batch: int,
    num_tokens: int,
    itemsize: int,
    relaxed: bool = True,
    pairs: float | None = None,
    products: int = 5,
) -> Work:
    """Its gradients: scores once more, then those of probabilities, values, queries and keys, five products.

    `products=7`: in two passes without atomics, which compute the first two twice. `pairs` of a head, if not all.
    Read: query, key, value, output, its gradient, log-sum-exp, bias; written: the gradients of query, key, value and bias.
    """
    pairs = batch * shape.num_heads * (num_tokens * (num_tokens + 1) / 2 if pairs is None else pairs)
    biases = FLOAT * batch * shape.num_kv_heads * num_tokens if relaxed else 0
    return Work(products * 2 * shape.head_dim * pairs, _tensors(shape, batch, num_tokens, itemsize, 4, 4, relaxed) + biases)


def _tensors(shape: Shape, batch: int, num_tokens: int, itemsize: int, wide: int, narrow: int, relaxed: bool) -> float:
    """Bytes of so many tensors as wide as all query heads and as all KV heads, of log-sum-exp, and of the bias if any."""
    heads = wide * shape.num_heads + narrow * shape.num_kv_heads
    numbers = shape.num_heads + (shape.num_kv_heads if relaxed else 0)
    return batch * num_tokens * (itemsize * shape.head_dim * heads + FLOAT * numbers)


def visible_pairs(num_tokens: int, window: int, kept_share: float) -> float:
    """Pairs of a head in which the key is visible: all within the window, of the older keys the share that was kept."""
    window = min(window, num_tokens)
    inside = window * (window + 1) / 2 + window * (num_tokens - window)
    return inside + kept_share * (num_tokens * (num_tokens + 1) / 2 - inside)


def prefill_attention(
    shape: Shape, batch: int, num_tokens: int, itemsize: int, window: int = 256, kept_share: float = 1.0
) -> Work:
    """A prompt's attention with hard decisions, if no pair of an evicted key were computed."""
    pairs = visible_pairs(num_tokens, window, kept_share)
    return attention_forward(shape, batch, num_tokens, itemsize, False, pairs)


def decode_attention(shape: Shape, batch: int, live_tokens: float, itemsize: int) -> Work:
    """One query of each sequence over its live slots, whose keys and values are read once; the new ones are written."""
    kv = 2 * shape.num_kv_heads * shape.head_dim * itemsize
    query = 2 * shape.num_heads * shape.head_dim * itemsize
    flops = 4 * shape.num_heads * shape.head_dim * live_tokens
    return Work(flops, kv * (live_tokens + 2) + query) * batch


# -- matrix products -----------------------------------------------------------------------------------------------------
def matrices(shape: Shape, num_rows: int, itemsize: int) -> Work:
    """The matrix products of one layer for so many tokens: weights read once, activations in and out of each product."""
    query, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    widths = (shape.hidden + query + 2 * kv) + (query + shape.hidden) + (shape.hidden + 2 * shape.mlp)
    widths += shape.mlp + shape.hidden
    return Work(2 * num_rows * shape.layer_weights, itemsize * (shape.layer_weights + num_rows * widths))


def head(shape: Shape, num_rows: int, itemsize: int) -> Work:
    """The output head for so many tokens, fused with what follows: the logits are never written."""
    weights = shape.vocabulary * shape.hidden
    return Work(2 * num_rows * weights, itemsize * (weights + num_rows * shape.hidden))


def distillation_loss(shape: Shape, num_rows: int, itemsize: int) -> Work:
    """The KL with the gradient of the student's hidden states: two heads forward, one product back."""
    return head(shape, num_rows, itemsize) * 3 + Work(0, itemsize * num_rows * shape.hidden)


# -- whole steps ---------------------------------------------------------------------------------------------------------
def training_step(
    shape: Shape,
    batch: int,
    context: int,
    itemsize: int,
    trained: str,
    checkpointing: bool = True,
    keep_attention: bool = False,
) -> Work:
    """One micro-batch: the teacher forward, the student forward (twice with checkpointing) and backward, the KL.

    `keep_attention`: the second time without attention, whose output and log-sum-exp of the first stay in memory.
    `trained="all"`: gradients of weights as well, and one AdamW step in float32 (weight, gradient, two moments read, three
    written); else the base is frozen and its weights get none. Predictors and LoRA are left out: below a percent.
    """
    rows, forwards = batch * context, 2 + checkpointing
    dense = matrices(shape, rows, itemsize)
    layer = dense * (forwards + (2 if trained == "all" else 1))
    layer += attention_forward(shape, batch, context, itemsize, relaxed=False)
    layer += attention_forward(shape, batch, context, itemsize) * (1 if keep_attention else forwards - 1)
    layer += attention_backward(shape, batch, context, itemsize)
    work = layer * shape.num_layers + distillation_loss(shape, rows, itemsize)
    if trained == "all":
        weights = shape.num_layers * shape.layer_weights + shape.vocabulary * shape.hidden
        work += head(shape, rows, itemsize) + Work(0, 7 * FLOAT * weights)
    return work


def passes(shape: Shape, num_rows: int, itemsize: int, ceilings: Ceilings) -> tuple[float, float]:
    """Seconds of a layer's matrix products for teacher and student: one after the other; and with weights read once."""
    one = matrices(shape, num_rows, itemsize)
    both = Work(2 * one.flops, 2 * one.bytes - itemsize * shape.layer_weights)
    return 2 * max(one.floors(ceilings)), max(both.floors(ceilings))


def decode_step(shape: Shape, batch: int, live_tokens: float, itemsize: int) -> Work:
    """A token for each sequence: every weight once, live slots once a sequence, the logits."""
    layer = matrices(shape, batch, itemsize) + decode_attention(shape, batch, live_tokens, itemsize)
    return layer * shape.num_layers + head(shape, batch, itemsize)
