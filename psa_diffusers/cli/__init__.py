"""The commands: their options, messages and exit codes."""
