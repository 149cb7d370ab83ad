"""Attention under eviction: `reference` is the specification, `soft` trains."""
