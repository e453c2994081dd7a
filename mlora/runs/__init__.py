"""What the commands start: a run from config to results, its folder, its log and its exit status."""
