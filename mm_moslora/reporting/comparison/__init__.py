"""The page of a comparison and its charts."""
