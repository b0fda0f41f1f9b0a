"""One file for each language of the page: its NAME, its TEXTS, and CHOICES, names of values. All have the same keys."""
