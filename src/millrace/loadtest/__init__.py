"""Load tests of endpoints: open and closed loop, percentiles, a verdict, a page."""
