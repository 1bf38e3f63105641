"""Smaller variants, each under a guarantee."""
