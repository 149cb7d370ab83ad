"""Training attention in Triton: `relaxed` is the door, a kernel has a file of its own, `far` and `spans` say what to skip.

    query, key, value, log_keep, document
        -> spans   of every token: where its document begins and ends
        -> far     of every KV head: the keys that still count beyond the window, packed together
        -> forward (output, log-sum-exp)        each query block: its window, then the packed keys up to it
        -> delta, query_grad, key_grad          the same pairs again; no atomics, so the same bits every time

Nothing here was measured on a GPU yet: right on a CPU through Triton's interpreter, compiled for Hopper without one.
"""
