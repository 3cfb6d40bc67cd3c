"""What the compiled forward pass is told of a model: records of addresses and sizes, as NumPy structured types.

model/compiled.py fills them in, decode_step.py and prefill.py read them: one compiled text for every model. An address
0 means that the model has no such thing.
"""

import numpy as np

_ADDRESS = np.int64

PRODUCT = np.dtype(
    [
        ("table", _ADDRESS),  # of the weight, as its kernel wants it
        ("kernel", _ADDRESS),  # a tile product for the number of tokens at hand
        ("kind", np.int64),  # of activations, as laid_out.laid_kind gives it
        ("tiles", np.int64),
    ]
)

# y = main x + other (before x) + bias: a LowRank has `other` and `before`, a Sum `main` and `other` or both of these.
LINEAR = np.dtype(
    [
        ("main", PRODUCT),
        ("other", PRODUCT),
        ("before", PRODUCT),  # without it, `other` multiplies x itself
        ("rank", np.int64),  # numbers that `before` makes
        ("between", _ADDRESS),  # where they stand: a row a token, padded to whole blocks of 32
        ("tiles", np.int64),  # of y
        ("bias", _ADDRESS),  # padded to whole tiles
        ("turn", _ADDRESS),  # of o and down: the matrix of turn_kernels, where inputs are turned
        ("base", np.int64),  # its rows
        ("inner", np.int64),  # inputs that move together
    ]
)

LAYER = np.dtype(
    [(name, LINEAR) for name in ("q", "k", "v", "o", "gate", "up", "down")]
    + [(name, _ADDRESS) for name in ("input_norm", "q_norm", "k_norm", "attention_norm", "mlp_norm", "output_norm")]
    + [
        ("cos", _ADDRESS),  # (tokens, head_dim / 2) of the tokens at hand, likewise sin
        ("sin", _ADDRESS),
        ("keys", _ADDRESS),  # (kv heads, room, head_dim) float32, where the token at position 0 is, or would be
        ("values", _ADDRESS),
        ("room", np.int64),
        ("value_room", np.int64),  # of the values, where a token is written beside codes
        ("coded", _ADDRESS),  # of kv_attention.WORDS: keys and values in codes, the last ones in float32
        ("window", np.int64),  # 0: none
    ]
)

HEAD = np.dtype([("norm", _ADDRESS), ("linear", LINEAR)])

# Rows of numbers, one a token, as long as `model/compiled.py` pads them: to whole blocks of 32.
BUFFERS = np.dtype(
    [
        (name, _ADDRESS)
        for name in (
            "x",  # the residual stream
            "q", "k", "v",
            "mixed",  # what attention gives
            "gate", "up",
            "branch",  # what o and down give
            "extra",  # what is added to the main product of a linear
            "logits",  # of one token
            "laid",  # activations laid out, of many tokens
            "lay_out",  # the kernel that lays out
            "attend",  # a table of kernels, for codes if there are: number i is for i heads that share keys and values
            "meeting",  # of the team
        )
    ]
)  # fmt: skip
