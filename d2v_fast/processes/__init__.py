"""This process and others on the same machine: signals, idle processes, and whether another one is alive."""
