"""The report of a run: typed data, and its three faces (JSON, terminal, HTML)."""
