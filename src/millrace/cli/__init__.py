"""The command line: derived from the operation table, plus the short verbs."""
