"""The load test: real conversations replayed against servers that speak OpenAI's protocol."""
