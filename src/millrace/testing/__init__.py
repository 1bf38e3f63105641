"""Conformance suites for every port, for authors of implementations."""
