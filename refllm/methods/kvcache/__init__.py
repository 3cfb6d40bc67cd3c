"""Methods that shrink the key-value cache: `f(layer, *, knobs) -> store`, see `refllm.model.cache`."""

from refllm.methods.kvcache.cla import cla as cla
from refllm.methods.kvcache.cq import cq as cq
from refllm.methods.kvcache.freekv import freekv as freekv
from refllm.methods.kvcache.h2o import h2o as h2o
from refllm.methods.kvcache.kivi import kivi as kivi
from refllm.methods.kvcache.kvquant import kvquant as kvquant
from refllm.methods.kvcache.kvtuner import kvtuner as kvtuner
from refllm.methods.kvcache.llmqat import llmqat as llmqat
from refllm.methods.kvcache.minicache import minicache as minicache
from refllm.methods.kvcache.pqcache import pqcache as pqcache
from refllm.methods.kvcache.qserve import qserve as qserve
from refllm.methods.kvcache.razor import razor as razor
from refllm.methods.kvcache.rotatekv import rotatekv as rotatekv
from refllm.methods.kvcache.snapkv import snapkv as snapkv
from refllm.methods.kvcache.streaming import streaming as streaming
from refllm.methods.kvcache.turboquant import turboquant as turboquant

__all__ = [
    "cla",
    "cq",
    "freekv",
    "h2o",
    "kivi",
    "kvquant",
    "kvtuner",
    "llmqat",
    "minicache",
    "pqcache",
    "qserve",
    "razor",
    "rotatekv",
    "snapkv",
    "streaming",
    "turboquant",
]
