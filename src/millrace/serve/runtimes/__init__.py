"""Runtimes: what runs a model."""
