"""Pictures and videos: finding, fetching and decoding files."""
