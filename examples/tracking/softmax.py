"""Softmax regression in numpy on the real digits, tracked by Millrace.

python softmax.py
"""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

import millrace

LEARNING_RATE = 0.5
STEPS = 200

pixels, labels = load_digits(return_X_y=True)
pixels, targets = pixels / 16.0, np.eye(10)[labels]
weights = np.zeros((64, 10))

with millrace.track("softmax", params={"learning_rate": LEARNING_RATE, "steps": STEPS}) as tracked:
    for step in range(STEPS):
        scores = pixels @ weights
        answers = np.exp(scores - scores.max(axis=1, keepdims=True))
        answers /= answers.sum(axis=1, keepdims=True)
        loss = -np.log((answers * targets).sum(axis=1)).mean()
        weights -= LEARNING_RATE * pixels.T @ (answers - targets) / len(pixels)
        tracked.log_metric("loss", float(loss), step=step)
    accuracy = float((answers.argmax(axis=1) == labels).mean())
    tracked.log_metric("accuracy", accuracy, step=STEPS)
    tracked.log_params({"rows": len(pixels)})
    np.savez("weights.npz", weights=weights)
    tracked.log_artifact("weights.npz")

print(f"loss {loss:.3f}, accuracy {accuracy:.1%}")
