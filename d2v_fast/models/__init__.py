"""Transformer encoders, independent of the modality."""
