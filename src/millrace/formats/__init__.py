"""What things are on disk, and how to open and time them."""
