"""Types, ports, spec, errors: what everything else is made of."""
