"""Jobs, the loop that trains them together, and their checkpoints."""
