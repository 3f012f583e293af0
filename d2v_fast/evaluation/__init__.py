"""Features of frozen encoders and the probes on them."""
