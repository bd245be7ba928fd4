"""Before training: every row read, every surprise named, and what the model sees shown."""
