"""Metrics of no benchmark in particular: numbers, counts, points, edits of texts, tables, mathematics."""
