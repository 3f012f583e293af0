"""Correct headers of recordings that libsndfile would misread."""
