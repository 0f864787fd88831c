"""Pages as Markdown: their blocks, the matching of blocks with an annotation, and OmniDocBench's scores."""
