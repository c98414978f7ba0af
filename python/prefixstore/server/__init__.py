"""OpenAI-compatible HTTP over an engine: `app.create_app`, and the command `kvkernels serve`."""
