"""What travels: codecs turn named tensors into messages and back."""

from sterna.codecs.error_feedback import ErrorFeedback
from sterna.codecs.fp16 import Fp16
from sterna.codecs.identity import Identity
from sterna.codecs.terngrad import TernGrad

__all__ = ["ErrorFeedback", "Fp16", "Identity", "TernGrad"]
