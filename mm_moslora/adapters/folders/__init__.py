"""Adapter folders: writing, reading, other libraries' formats, exports."""
