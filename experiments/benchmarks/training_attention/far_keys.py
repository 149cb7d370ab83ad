"""Does training on a CPU gain by leaving out keys that cannot count?

    python -m experiments.benchmarks.training_attention.far_keys runs/<run>

    a finished run of model=tiny -> checkpoints of its family -> one batch at the step of each
        share of the keys that count beyond the window, by `kernels.far`
        time of a step with `chunked` as it is, and with `_Packed`, which computes those alone; in turns

`_Packed` is `soft._ChunkedAttention` without soft-caps, sinks and sliding windows: of each KV head the keys that count
beyond the window lie packed together, as many places for each head as the one with the most needs.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dms_lab import attention_function, models
from dms_lab.attention import soft
from dms_lab.attention.kernels.far import LOG2E, select_far
from dms_lab.config import resolve
from dms_lab.training.data import RetrofitData
from dms_lab.training.run import build_module
from experiments.benchmarks import harness

_soft_attention = soft.soft_attention


class _Far:
    """The packed keys of one layer, and the scores of a chunk of queries over them and over the near keys."""

    shares: list[Tensor] = []  # of the keys of each head that are packed, a tensor a layer and step

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, log_keep: Tensor, window: int, scaling: float) -> None:
        self.key, self.value, self.window, self.scaling = key, value, window, scaling
        found = select_far(query, key, log_keep, None, scaling)
        self.shares.append(found.count[..., -1].float().mean(0) / key.shape[2])
        self.counts = found.count.amax((0, 1)).tolist()
        self.position = found.position[..., : self.counts[-1]].long()
        self.void = self.position == key.shape[2]
        self.index = self.position.clamp(max=key.shape[2] - 1)
        self.rows = self.index[..., None].expand(-1, -1, -1, key.shape[3])
        self.far_key, self.far_value = key.gather(2, self.rows), value.gather(2, self.rows)
        self.bias, self.log_keep = found.bias[..., : self.counts[-1]], log_keep * LOG2E

    def scores(self, query: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Scores [B, K, G, C, n + near], those keys and values, n, and the first near key."""
        first = max(0, start - self.window + 1)
        n = self.counts[first]
        keys = torch.cat([self.far_key[:, :, :n], self.key[:, :, first:stop]], 2)
        values = torch.cat([self.far_value[:, :, :n], self.value[:, :, first:stop]], 2)
        chunk = query[:, :, :, start:stop]
        scores = (chunk.flatten(2, 3) * (self.scaling * LOG2E)) @ keys.transpose(2, 3)
        distance = soft._distance(start, stop, first, query.device)
        near = torch.where(distance >= self.window, self.log_keep[:, :, None, first:stop], 0.0)
        far = self.bias[:, :, :n].masked_fill(self.position[:, :, :n] >= first, -math.inf)
        far = far[:, :, None].expand(-1, -1, stop - start, -1)
        scores = scores.view(*chunk.shape[:4], -1)
        scores += torch.cat([far, near.masked_fill(distance < 0, -math.inf)], 3)[:, :, None]
        return scores, keys, values, n, first


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, log_keep, window, scaling):
        far = ctx.far = _Far(query, key, value, log_keep, window, scaling)
        q = query.reshape(*key.shape[:2], -1, *query.shape[2:])
        output, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
        for start in range(0, q.shape[3], soft._CHUNK):
            stop = min(start + soft._CHUNK, q.shape[3])
            scores, _, values, _, _ = far.scores(q, start, stop)
            highest = scores.amax(-1)
            weights = scores.sub_(highest[..., None]).exp2_()
            total = weights.sum(-1)
            chunk = weights.flatten(2, 3) @ values
            output[:, :, :, start:stop] = chunk.view(*weights.shape[:4], -1).div_(total[..., None])
            lse[:, :, :, start:stop] = highest + total.log2()
        ctx.save_for_backward(q, output, lse)
        return output.view(query.shape)

    @staticmethod
    def backward(ctx, grad):
        far, (q, output, lse) = ctx.far, ctx.saved_tensors
        g = grad.reshape(q.shape)
        delta, dq = (g * output).sum(-1), torch.empty_like(q)
        near = [torch.zeros_like(x) for x in (far.key, far.value, far.log_keep)]
        packed = [torch.zeros_like(x) for x in (far.far_key, far.far_value, far.bias)]
        for start in range(0, q.shape[3], soft._CHUNK):
            stop = min(start + soft._CHUNK, q.shape[3])
            scores, keys, values, n, first = far.scores(q, start, stop)
            weights = scores.sub_(lse[:, :, :, start:stop, None]).exp2_()
            gc = g[:, :, :, start:stop].flatten(2, 3)
            dv = weights.flatten(2, 3).transpose(2, 3) @ gc
            ds = (gc @ values.transpose(2, 3)).view(weights.shape)
            ds.sub_(delta[:, :, :, start:stop, None]).mul_(weights)
            biased = soft._distance(start, stop, first, ds.device) >= far.window
            dbias = torch.cat([ds[..., :n].sum((2, 3)), (ds[..., n:].sum(2) * biased).sum(2)], 2)
            flat = ds.flatten(2, 3).mul_(far.scaling)
            dq[:, :, :, start:stop] = (flat @ keys).view(*ds.shape[:4], -1)
            dk = flat.transpose(2, 3) @ q[:, :, :, start:stop].flatten(2, 3)
            for ours, theirs, found in zip(near, packed, (dk, dv, dbias), strict=True):
                ours[:, :, first:stop].add_(found[:, :, n:])
                theirs[:, :, :n].add_(found[:, :, :n])
        for ours, theirs, rows in zip(near, packed, (far.rows, far.rows, far.index), strict=True):
            void = far.void if theirs.ndim == 3 else far.void[..., None]
            ours.scatter_add_(2, rows, theirs.masked_fill(void, 0.0))
        return dq.view(grad.shape), *near, None, None


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = resolve(json.loads((args.run / "config.json").read_text()) | {"steps_per_cr": 1.0})
    module, _ = build_module(config)
    module.on_fit_start()
    data = RetrofitData(config, models.load_tokenizer(config.model))
    optimizer = torch.optim.AdamW(list(module.trained.values()), lr=0.0)

    def packed(query, key, value, log_keep, window, document, scaling, **_):
        if log_keep is None:
            return _soft_attention(query, key, value, None, window, document, scaling)
        if not soft._one_document_each(document):
            raise SystemExit("rows of several documents are not measured; give a run of data=tiny")
        output = _Packed.apply(query, key, value, log_keep.expand(key.shape[:3]), window, scaling)
        return output.masked_fill((document < 0)[:, None, :, None], 0.0)

    def step(attention, batch, number: int) -> tuple[float, Tensor]:
        attention_function.soft_attention = attention
        began = time.process_time()
        module.loss(batch, number).backward()
        gradient = torch.cat([p.grad.flatten() for p in module.trained.values() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - began, gradient

    cells, num_layers = [], len(module.handle.attentions)
    for cr in (1.0, *config.cr_family):
        if cr > 1:
            weights = load_file(args.run / "checkpoints" / f"cr{cr:g}" / "dms.safetensors")
            module.model.load_state_dict(weights, strict=False)
        number = next((n for n in range(config.steps) if module.objective.cr_at(n + 1) >= cr), config.steps - 1)
        batch, ratios, seconds = data.batch(number), [], []
        for _ in range(args.rounds):
            (whole, wanted), (less, found) = (step(attention, batch, number) for attention in (_soft_attention, packed))
            ratios.append(less / whole)
            seconds.append(whole)
        error = float((found - wanted).norm() / wanted.norm())
        share = ", ".join(f"{100 * float(x):.0f}" for layer in _Far.shares[-num_layers:] for x in layer)
        ms = f"{1e3 * statistics.median(seconds):.0f}"
        cells.append((f"{cr:g}", number, share, ms, f"{statistics.median(ratios):.2f}", f"{error:.0e}"))
    head = (
        "CR of the schedule",
        "step",
        "keys that count, % of each head",
        "step ms",
        "packed / whole",
        "gradients differ",
    )
    print(harness.table(head, cells))


if __name__ == "__main__":
    main()
