"""The Python SDK over a Transport, and tracking from user code."""
