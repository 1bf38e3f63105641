"""The data plane: requests in, predictions out."""
