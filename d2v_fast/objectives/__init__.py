"""Training objectives: student outputs and teacher targets in, loss out."""
