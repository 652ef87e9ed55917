"""The loop and what it needs. Import from the modules: `ramify.decode.generate`, `ramify.decode.loop`, `ramify.sampling.pipeline`."""
