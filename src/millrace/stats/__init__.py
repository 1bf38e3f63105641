"""Pure statistics that several rooms need."""
