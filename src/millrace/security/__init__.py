"""Signatures and the event chain."""
