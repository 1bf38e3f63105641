"""Operations: dispatch, pipeline, journal, registry, report."""
