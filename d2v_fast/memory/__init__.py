"""Memory of a run: predicted per process, and measured."""
