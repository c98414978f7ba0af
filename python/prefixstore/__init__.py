"""The prefix cache of a language model: index, tiers and the sessions that use them."""
