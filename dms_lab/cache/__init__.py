"""Caches: `masked` keeps everything and hides what is evicted (the oracle)."""
