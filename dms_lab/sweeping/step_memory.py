"""The peak of a GPU's memory in a training step, by arithmetic alone: what a plan says before anything is loaded.

    kept       weights, the teacher's where it is a copy; what is trained, its gradients, AdamW's moments, their average
    then the higher of
    loss       what the layers left; hidden states of student and teacher; a chunk's logits; gradients of a trained head
    backward   what the layers left; one layer computed again, with all that it saves; the gradients inside its MLP; or, at
               the end, gradients of all weights

Bytes of tensors, as torch's allocator counts them (`peak_memory_bytes` in metrics.jsonl); the CUDA context and memory that
is lost between blocks come on top. Attention is taken to save its inputs and its output, which `reference` does not hold
to; the optimizer to be fused, as it is on a GPU. With strategy=fsdp weights are cut, while two layers, embeddings and heads
are whole.

Letters: N tokens of a micro-batch, s bytes of a number in the model's precision, d hidden width, C tokens of a chunk, V
vocabulary. With precision=bf16-mixed, which `auto` is here for trained=all, what products take and give has 2 bytes: their
weights are copies for as long as they are needed, those of the teacher are held so.
"""

from dataclasses import dataclass

from dms_lab.config import TrainConfig, is_mixed, num_processes
from dms_lab.sweeping.shapes import Shape, num_trained

CHUNK_TOKENS = 1024  # of the distillation loss
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOAT = 4


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one GPU: `kept` throughout, and what the loss and the backward hold beside it when they hold most."""

    kept: float
    loss: float
    backward: float

    @property
    def peak(self) -> float:
        """The most that is held at once."""
        return self.kept + max(self.loss, self.backward)


def step_memory(config: TrainConfig, shape: Shape) -> StepMemory:
    """What the steps of a run hold on each of its GPUs, once the optimizer has its moments."""
    return StepMemory(
        _kept(config, shape), _loss(config, shape), max(_backward_start(config, shape), _backward_end(config, shape))
    )


# -- sizes ---------------------------------------------------------------------------------------------------------------
def _tokens(config: TrainConfig) -> int:
    return config.batch_size * config.context


def _itemsize(config: TrainConfig) -> int:
    return _BYTES[config.model.dtype]


def _product_size(config: TrainConfig) -> int:
    """Bytes of a number that a matrix product or attention takes or gives."""
    return _BYTES["bfloat16"] if is_mixed(config, on_gpu=True) else _itemsize(config)


def _stream(config: TrainConfig, shape: Shape) -> float:
    """The residual stream, s * N * d."""
    return _itemsize(config) * _tokens(config) * shape.hidden


def _cut(config: TrainConfig) -> int:
    """Over how many GPUs weights are cut."""
    return num_processes(config) if config.strategy == "fsdp" else 1


def _adds_up(config: TrainConfig) -> bool:
    """Whether gradients of earlier micro-batches are there while one is computed."""
    return config.accumulate > num_processes(config)


def _saved_by_norm(config: TrainConfig, shape_width: int) -> float:
    """What a norm in float32 saves: its input, and for a trained weight its output before that."""
    return _FLOAT * _tokens(config) * shape_width * (2 if config.trained == "all" else 1)


def _saved_by_layer(config: TrainConfig, shape: Shape) -> float:
    """What one layer saves for its backward."""
    tokens, size = _tokens(config), _product_size(config)
    saved = 2 * _saved_by_norm(config, shape.hidden)
    if shape.query_norm:
        saved += _saved_by_norm(config, shape.query_width + shape.kv_width)
    saved += 2 * size * tokens * (shape.query_width + shape.kv_width)  # attention: queries, output; keys, values
    saved += 3 * size * tokens * shape.mlp  # gate, its activation, up
    if config.method == "dms" and config.predictor == "adapter":  # in float32: its input, normalised, weighted
        saved += _FLOAT * tokens * shape.hidden * (2 if _itemsize(config) == _FLOAT else 3)
    if config.trained == "all":  # inputs of the linear layers
        saved += size * tokens * (2 * shape.hidden + shape.query_width + shape.mlp)
    if is_mixed(config, on_gpu=True):
        saved += size * shape.layer_parameters
    if config.trained == "lora":  # the same in float32, of queries, keys and values one each where that is a copy
        saved += _FLOAT * tokens * ((1 if size == _FLOAT else 3) * shape.hidden + shape.query_width)
    return saved


def _kept_attention(config: TrainConfig, shape: Shape) -> float:
    """The output of one layer's attention, where it is kept over the recomputation; the log-sum-exp is below 2 % of it."""
    if not (config.model.gradient_checkpointing and config.keep_attention and config.attention in ("triton", "chunked")):
        return 0.0
    size = _product_size(config) if config.attention == "triton" else _FLOAT
    return size * _tokens(config) * shape.query_width


def _left_by_layers(config: TrainConfig, shape: Shape) -> float:
    """What the forward leaves for the backward: the layers' inputs, or all that they saved; noise and decisions."""
    checkpointed = _stream(config, shape) + _kept_attention(config, shape)
    each = checkpointed if config.model.gradient_checkpointing else _saved_by_layer(config, shape)
    return shape.num_layers * (each + (2 * _FLOAT + 1) * _tokens(config) * shape.num_kv_heads)


def _weights(config: TrainConfig, shape: Shape, num_layers: float) -> float:
    """Weights of student and, where it is a copy, teacher: of so many layers, the embeddings and the head."""
    layers = num_layers * shape.layer_parameters
    others = shape.num_parameters - shape.num_layers * shape.layer_parameters
    one = _itemsize(config) * (layers + others)
    if is_mixed(config, on_gpu=True):
        return one + _product_size(config) * (layers + shape.embedding_parameters) + _FLOAT * shape.embedding_parameters
    return 2 * one if config.trained == "all" else one


def _head_gradient(config: TrainConfig, shape: Shape) -> float:
    return _FLOAT * shape.vocabulary * shape.hidden if config.trained == "all" else 0.0


# -- moments of a step ---------------------------------------------------------------------------------------------------
def _kept(config: TrainConfig, shape: Shape) -> float:
    trains_all, trained = config.trained == "all", _FLOAT * num_trained(config, shape)
    weights = _weights(config, shape, shape.num_layers) + (0 if trains_all else trained)
    moments = trained * (3 if config.average else 2)
    gradients = trained if _adds_up(config) or not trains_all else 0.0
    if _cut(config) == 1:
        return weights + moments + gradients
    return (weights + moments + gradients) / _cut(config) + _weights(config, shape, 2)


def _loss(config: TrainConfig, shape: Shape) -> float:
    size, head = _product_size(config), _head_gradient(config, shape)
    logits = min(CHUNK_TOKENS, _tokens(config)) * shape.vocabulary
    chunk = (3 * _FLOAT + (size if size < _FLOAT else 0)) * logits
    low = size * shape.embedding_parameters if is_mixed(config, on_gpu=True) else 0.0  # a copy of the head, its gradient
    # Hidden states of both, the real ones of both, gradients of these.
    hidden = 5 * _stream(config, shape) + _saved_by_norm(config, shape.hidden)
    return _left_by_layers(config, shape) + hidden + max(chunk + head + low, _FLOAT * logits + 2 * (head + low))


def _inside_layer(config: TrainConfig, shape: Shape) -> float:
    """A layer's backward when it holds most: the gradient that comes in, what it saved, the gradients inside its MLP."""
    wide = _product_size(config) * _tokens(config) * shape.mlp
    again = _saved_by_layer(config, shape) if config.model.gradient_checkpointing else 0.0
    return _stream(config, shape) + again + (2 if config.trained == "all" else 3) * wide


def _backward_start(config: TrainConfig, shape: Shape) -> float:
    twice = _kept_attention(config, shape)  # among what the layers left, and what the last one saved
    return _left_by_layers(config, shape) + _head_gradient(config, shape) + _inside_layer(config, shape) - twice


def _backward_end(config: TrainConfig, shape: Shape) -> float:
    """In the first layer and after it, in the embeddings, with all gradients of a model whose weights are all trained."""
    if config.trained != "all":
        return 0.0
    head = _head_gradient(config, shape)
    layers = 0.0 if _adds_up(config) else _FLOAT * shape.num_layers * shape.layer_parameters / _cut(config)
    in_layer = layers * (1 - 1 / shape.num_layers) + head + _stream(config, shape) + _inside_layer(config, shape)
    return max(in_layer, layers + 2 * head + _stream(config, shape))
