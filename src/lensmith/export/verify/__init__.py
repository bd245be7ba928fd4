"""Whether the model that leaves a run is the one that was trained: seven checks, in minutes."""
