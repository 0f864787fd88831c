"""Pictures and videos: finding, fetching, decoding."""
