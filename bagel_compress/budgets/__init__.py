"""Memory and time of a build on a target, predicted or measured; and which recipe or target fits.

Reading order: fake_model, memory_tracker and predict (peak memory without a GPU), overruns (limits), latency and
measure_gpu (measurements), plan_devices (several GPUs), recommend, advise and fit (what fits a GPU).
"""
