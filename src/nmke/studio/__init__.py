"""The studio: edit, look, compare and undo in the browser, and an HTTP API; it calls the session and holds no logic."""
