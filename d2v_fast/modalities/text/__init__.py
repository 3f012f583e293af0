"""Text: token ids, one row per token."""
