"""The page's own files: read by `refmamba.teach.pages`, and never imported."""
