"""The hook: plans put into a transformers model and taken out again."""
