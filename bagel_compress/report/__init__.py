"""Pages, charts and texts of what was measured."""
