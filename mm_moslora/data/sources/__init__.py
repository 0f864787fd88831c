"""Where records come from: JSON, tables, tar files."""
