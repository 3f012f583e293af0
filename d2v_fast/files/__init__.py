"""Files: reading what others wrote, with limits, and writing files that are complete or absent."""
