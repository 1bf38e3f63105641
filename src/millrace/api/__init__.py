"""The HTTP face of a home: routes derived from the operation table, streams, pages, MLflow's protocol."""
