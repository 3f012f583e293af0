"""Several processes: how they agree, who is missing, and which part of each parameter a process holds."""
