"""The `d2v-fast` command. `console` calls every subcommand; here are those that have no other home."""
