"""Parts of the client of chat services: forms of requests and replies, pictures, limits, threads."""
