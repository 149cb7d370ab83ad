"""Retrofit training with Lightning: wiring only."""
