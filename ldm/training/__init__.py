"""What every training script shares: configuration, data, randomness, the loop, checkpoints."""
