"""Pictures that runs and commands draw."""
