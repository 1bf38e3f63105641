"""Batch inference: answers for files of rows, on all cores, written once."""
