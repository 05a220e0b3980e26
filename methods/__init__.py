"""What is skipped: one file a scheme, written from its paper. Knows the vocabulary and nothing else."""
