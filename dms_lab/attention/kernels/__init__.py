"""Kernels in Triton, a kernel a file. `relaxed` and `paged` are the doors.

training, `relaxed`       query, key, value, log_keep, document
    -> spans   of every token: where its document begins and ends
    -> far     of every KV head: the keys that still count beyond the window, packed together
    -> forward (output, log-sum-exp)        each query block: its window, then the packed keys up to it
    -> delta, query_grad, key_grad          the same pairs again; no atomics, so the same bits every time

hard decisions, `paged`   query, slots in pages, and of a chunk its keys, values and decisions
    -> paged_append           a token a sequence: its slot, its page, its key and value
    -> paged_decode           one query a sequence: parts of each head's slots side by side, then their sum
    -> until -> paged_chunk   of every key the first query that does not see it any more, then the blocks that are seen

Nothing here was measured on a GPU yet: right on a CPU through Triton's interpreter, compiled for Hopper without one.
"""
