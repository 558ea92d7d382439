"""Files: replaced whole or not at all, and torch files without pickle."""
