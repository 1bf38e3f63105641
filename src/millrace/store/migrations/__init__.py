"""Alembic revisions of the schema, shipped as package data."""
