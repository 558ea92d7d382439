"""Files: replaced whole or not at all, folders of JSON and tensors, and torch files without pickle."""
