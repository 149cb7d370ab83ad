"""Caches: `compact` frees what is evicted; `masked` keeps everything and hides it (the oracle)."""
