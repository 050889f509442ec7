"""The studio's pages: Gradio Blocks, one file per tab; every value that a page shows is escaped by its template."""
