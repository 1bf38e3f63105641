"""From files to immutable dataset versions."""
