"""refllm: readable reference implementations of LLM compression in NumPy.

>>> import refllm
>>> model = refllm.load("tiny")
>>> refllm.forward(model, [1, 2, 3]).shape == (3, model.config.vocab_size)
True
"""

__version__ = "0.1.0"

# Names are handed out lazily: `import refllm` must stay cheap beside `import numpy`.
_EXPORTS = {
    "load": "refllm.methods.apply",
    "forward": "refllm.model.llama",
    "new_cache": "refllm.model.cache",
    "compress": "refllm.methods.apply",
    "perplexity": "refllm.evaluate.perplexity",
    "FormatError": "refllm.formats.errors",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        from importlib import import_module

        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'refllm' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
