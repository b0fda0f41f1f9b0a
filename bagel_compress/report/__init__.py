"""Draws measured values as HTML pages, SVG charts, JUnit XML and Markdown."""
