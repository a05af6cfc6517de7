from magi_attention import ops  # noqa: F401
