"""Another tool's script or settings -> run.yaml: read what is written, look each name up in a table, say what has no home."""
