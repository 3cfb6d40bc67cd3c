"""Settings of every property test: no limit on the time of one example, which a busy machine would break.

And which warning is no error on which processor.
"""

import platform

from hypothesis import settings

from refllm.cli import ARM, FALSE_ALARMS

settings.register_profile("refllm", deadline=None)
settings.load_profile("refllm")


def pytest_configure(config) -> None:
    """On ARM, leave out what the command line does."""
    if platform.machine().lower() in ARM:
        config.addinivalue_line("filterwarnings", f"ignore:{FALSE_ALARMS}:RuntimeWarning")
