"""A GPU that is not there, for Triton's launchers: what it is, and how many multiprocessors it has."""

from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Machine:
    """What the launchers, and Triton's compiler, ask of ``triton.runtime.driver.active``."""

    def __init__(self, target: str, processors: int):
        self.target, self.processors, self.utils = TARGETS[target], processors, self

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"multiprocessor_count": self.processors}

    def get_benchmarker(self):
        """Each candidate runs once, and the last is the fastest."""
        calls = iter(range(1000, 0, -1))

        def benchmark(run, quantiles):
            run()
            return next(calls)

        return benchmark
