"""What is measured of a cell, one file a probe."""
