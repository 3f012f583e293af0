"""Transformer encoders without anything that only one modality has."""
