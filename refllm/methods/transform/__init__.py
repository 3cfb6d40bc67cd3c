"""Transforms: `f(model, ids, *, on_report, knobs) -> Model`, other weights that compute the same function."""

from refllm.methods.transform.dartquant import dartquant as dartquant
from refllm.methods.transform.gqa import gqa as gqa
from refllm.methods.transform.mfa import mfa as mfa
from refllm.methods.transform.osplus import osplus as osplus
from refllm.methods.transform.palu import palu as palu
from refllm.methods.transform.quarot import quarot as quarot
from refllm.methods.transform.smoothattention import smoothattention as smoothattention
from refllm.methods.transform.smoothquant import smoothquant as smoothquant

__all__ = ["dartquant", "gqa", "mfa", "osplus", "palu", "quarot", "smoothattention", "smoothquant"]
