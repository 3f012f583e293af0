"""The `d2v-fast` command: one module per subcommand."""
