"""Bringing an MLflow store over (`formats.mlflow` reads it): records, a transaction each."""
