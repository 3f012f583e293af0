"""Images: patches, one row per patch."""
