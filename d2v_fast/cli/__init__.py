"""The command line: options of every command, the configuration they ask for, and how a command ends."""
