"""Records on SQL, blobs on disk."""
