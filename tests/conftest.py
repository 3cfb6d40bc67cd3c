"""Settings of every property test: no limit on the time of one example, which a busy machine would break."""

from hypothesis import settings

settings.register_profile("refllm", deadline=None)
settings.load_profile("refllm")
