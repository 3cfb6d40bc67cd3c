"""`python -m refllm` is `refllm`."""

import sys

from refllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
