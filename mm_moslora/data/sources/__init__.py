"""Sources of records: JSON files, tables, tar files."""
