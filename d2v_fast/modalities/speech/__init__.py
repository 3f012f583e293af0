"""Speech: waveform or log-mel input, one row per frame."""
