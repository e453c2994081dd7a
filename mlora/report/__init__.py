"""What a run shows: progress, tables. Imports no torch."""
