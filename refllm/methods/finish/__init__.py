"""What is added to a packed weight: `f(record, W, stats, *, knobs) -> record`, W being what was packed."""

from refllm.methods.finish.amber import amber as amber
from refllm.methods.finish.lorc import lorc as lorc
from refllm.methods.finish.static import static as static
from refllm.methods.finish.teal import teal as teal
from refllm.methods.finish.vqllm import vqllm as vqllm

__all__ = ["amber", "lorc", "static", "teal", "vqllm"]
