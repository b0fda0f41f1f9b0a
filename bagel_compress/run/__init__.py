"""Runs models: targets and cases, loading, device maps, offload to host memory, download of builds."""
