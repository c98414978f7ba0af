"""The demo: one agent loop over real documents on a real model, with the cache off and on."""
