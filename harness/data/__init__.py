"""Models and data from pinned wheels, lm-eval's tasks over them, and the texts that methods learn from."""
