"""Teaching: one forward, number by number, as text and as a page that computes it again."""
