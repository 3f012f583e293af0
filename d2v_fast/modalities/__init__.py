"""Front ends: raw input to token embeddings, one module per modality."""
