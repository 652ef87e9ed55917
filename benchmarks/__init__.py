"""Benchmarks of ramify against what people use today: one harness, one JSON schema, one file per question. See README.md."""
