"""MLflow's REST protocol over the same records: shapes, errors and the filter language; nothing else."""
