"""Running a model: what is asked of it, where, and how its weights get there."""
