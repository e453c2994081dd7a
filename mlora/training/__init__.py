"""Jobs, the loop that trains them together, and what a run writes."""
