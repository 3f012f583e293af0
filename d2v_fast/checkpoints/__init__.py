"""Checkpoints: writing, verifying, finding and reading them."""
