"""Rows, and how they lie on disk: cells, fits, locks, the collected table, published figures."""
