"""The command `steerfast`: one file a command."""
