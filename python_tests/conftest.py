from hypothesis import settings

# Random masks the same in every run: a failure in CI is the failure at home. Timing is for the benchmarks.
settings.register_profile("magi", deadline=None, derandomize=True)
settings.load_profile("magi")
