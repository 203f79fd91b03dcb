"""One run: training loop, state, checkpoints, snapshots and their measurements."""
