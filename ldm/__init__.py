"""The diffusion process, its network and its training."""
