"""Procedural rooms with exact truth: things, their rendering, marks, and questions about them."""
