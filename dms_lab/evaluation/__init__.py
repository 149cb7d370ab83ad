"""Evaluation with hard decisions: generated tasks and held-out perplexity, for every policy with the same accounting."""
