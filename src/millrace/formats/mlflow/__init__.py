"""MLflow's stores as they are read: the files of a file store, and the REST API of a server."""
