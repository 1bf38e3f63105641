"""The read-only web pages: HTML made on the server, a few small scripts, nothing from anywhere else."""
