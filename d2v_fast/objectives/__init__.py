"""Training objectives, which compute a loss from student outputs and teacher targets."""
