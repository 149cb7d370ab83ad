"""Attention under eviction: `reference` is the specification, `soft` trains, `kernels` holds what runs on a GPU."""
