"""What people read: the terminal's tables, the HTML page, archives, W&B, one cell or two."""
