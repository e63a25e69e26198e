"""The OpenAI endpoint of a cluster: parses, tokenizes, routes, relays, fails over; no tensors."""
