"""Headers of recordings that libsndfile would misread."""
