"""One file per revision. Frozen once released: a revision never imports the live schema."""
